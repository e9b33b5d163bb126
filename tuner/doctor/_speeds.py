"""How fast models train on this machine, each way that was measured, and which way is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tuner.doctor._finding import Finding, ok

if TYPE_CHECKING:
    from tuner.backends import Speed
    from tuner.datasets import Data
    from tuner.session import Session


def known_speeds() -> Iterator[Finding]:
    """What was measured here so far, of any study; nothing is measured for it."""
    from tuner.backends import all_speeds
    from tuner.training import SingleStage

    found = [_speed(label, measured, SingleStage()) for label, measured in all_speeds()]
    if not found:
        yield ok("speed", "nothing was measured here yet; the first trial of a model sees to it")
    yield from found


def speeds_of(session: Session, data: Data) -> Iterator[Finding]:
    """The speeds of each model that a study searches, measured unless they are known."""
    import torch
    from optuna.trial import FixedTrial

    from tuner.backends import label, speeds

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    space, on_device = session.file.space, data.to(device)
    for params in space.variants("model"):
        recipe = space.suggest(FixedTrial(params))
        measured = speeds(recipe, on_device, device)
        yield _speed(label(recipe, on_device, device), measured, recipe.training)


def _speed(label: str, measured: list[Speed], training: Any) -> Finding:
    """All ways of one model, the fastest first, and that which trials take."""
    from tuner.backends import fastest

    best = fastest(training, measured)
    ways = sorted(measured, key=lambda speed: -speed.images)
    each = ", ".join(f"{speed} {speed.images:.0f}" for speed in ways) or "nothing worked"
    return ok("speed", f"{label}: {each} images/s; trials take {best}")
