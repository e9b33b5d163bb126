"""What of a lane changes while it trains: copied into a snapshot, and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.checkpoint import (
    Snapshot,
    flatten_optimizer,
    prefixed,
    restore_optimizer,
    without_prefix,
)

if TYPE_CHECKING:
    from tuner.lane import Lane


def snapshot(lane: Lane) -> Snapshot:
    """Copy of everything that changes during training."""
    optimizer, optimizer_meta = flatten_optimizer(lane.optimizer)
    tensors = {
        **prefixed("model", lane.model.state_dict()),
        **prefixed("loss", lane.loss.state_dict()),
        **prefixed("optimizer", optimizer),
        **prefixed("noted", lane.noted_losses()),
        "generator": lane.generator.get_state(),
    }
    for stage, sampler in enumerate(lane.samplers[: lane.stage + 1]):
        tensors |= prefixed(f"sampler{stage}", sampler.state_dict())
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    meta = {"epoch": lane.epoch, "stage": lane.stage, "optimizer": optimizer_meta}
    return Snapshot(copies, {**meta, **lane.recipe.origin()})


def restore(lane: Lane, state: Snapshot) -> None:
    """Go on from ``state``: of the same recipe, or of a stage shared with another one.

    Raises:
        ValueError: The snapshot belongs to another recipe.
    """
    if refusal := lane.recipe.refusal(state.meta):
        raise ValueError(refusal)
    lane.epoch = state.meta["epoch"]
    # Two stages that do the same may be one here.
    lane.stage = min(state.meta["stage"], len(lane.samplers) - 1)
    lane.freeze()
    if lane.stage > 0:
        lane.optimizer = lane.build_optimizer()
    tensors = state.tensors
    lane.model.load_state_dict(without_prefix("model", tensors))
    lane.loss.load_state_dict(without_prefix("loss", tensors))
    # The optimizer takes tensors as its own and changes them; the snapshot must not change.
    optimizer = {n: t.clone() for n, t in without_prefix("optimizer", tensors).items()}
    restore_optimizer(lane.optimizer, optimizer, state.meta["optimizer"])
    lane.generator.set_state(tensors["generator"])
    noted = without_prefix("noted", tensors)
    lane.noted = [(noted["indices"], noted["losses"].to(lane.device))] if noted else []
    # What only later stages use has no state yet, and is each recipe's own.
    for stage, sampler in enumerate(lane.samplers[: lane.stage + 1]):
        sampler.load_state_dict(without_prefix(f"sampler{stage}", tensors))
