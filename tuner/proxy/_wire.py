"""Calls of a ledger as JSON: what travels between a worker and the proxy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from tuner.ledger import (
    Changes,
    Ending,
    Lease,
    LeaseLostError,
    Order,
    SupersededError,
    WorkerAliveError,
)

PROTOCOL = 4
CALL = "/tuner.Ledger/Call"
KIND = "$tuner"
PAGE = 200
DETAILS = 2000
METHODS = (
    *(
        "prepare",
        "ready",
        "enqueue",
        "claim",
        "claim_alike",
        "write",
        "finish",
        "finish_all",
        "reap",
        "register",
        "beat",
    ),
    *("leave", "workers", "alive", "running", "order", "standing", "give_order"),
    *("trial", "by_ids", "unfinished", "ended_after", "attempts", "epochs"),
)
"""What may be called through the proxy; nothing else is."""


def dumps(value: Any) -> bytes:
    """A value of calls and answers as JSON."""
    return json.dumps(value, default=_encode, separators=(",", ":")).encode()


def loads(content: bytes) -> Any:
    """The value of a JSON text that ``dumps`` made.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(content, object_hook=_decode)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a call: {error!r}") from None


def _encode(value: Any) -> dict[str, Any]:
    kind = type(value).__name__
    if kind not in _ENCODERS:
        raise TypeError(f"{kind} does not travel")
    return {KIND: kind, **_ENCODERS[kind](value)}


def _decode(fields: dict[str, Any]) -> Any:
    kind = fields.pop(KIND, None)
    return fields if kind is None else _DECODERS[kind](fields)


def _from_changes(changes: Changes) -> dict[str, Any]:
    # JSON has no whole numbers as keys.
    pairs = {"steps": list(changes.steps.items()), "epochs": list(changes.epochs.items())}
    return {
        "params": changes.params, "user": changes.user, "system": changes.system, **pairs
    }  # fmt: skip


def _to_changes(fields: dict[str, Any]) -> Changes:
    pairs = {key: dict(fields.pop(key)) for key in ("steps", "epochs")}
    return Changes(**fields, **pairs)


def _from_trial(trial: FrozenTrial) -> dict[str, Any]:
    kinds = trial.distributions
    return {
        "id": trial._trial_id,
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values,
        "times": [_from_local(trial.datetime_start), _from_local(trial.datetime_complete)],
        "params": [
            [name, kinds[name].to_internal_repr(value), distribution_to_json(kinds[name])]
            for name, value in trial.params.items()
        ],
        "user": trial.user_attrs,
        "system": trial.system_attrs,
        "steps": list(trial.intermediate_values.items()),
    }


def _to_trial(fields: dict[str, Any]) -> FrozenTrial:
    kinds = {name: _distribution(text) for name, _, text in fields["params"]}
    start, complete = map(_to_local, fields["times"])
    return FrozenTrial(
        number=fields["number"],
        state=TrialState[fields["state"]],
        value=None,
        values=fields["values"],
        datetime_start=start,
        datetime_complete=complete,
        params={name: kinds[name].to_external_repr(v) for name, v, _ in fields["params"]},
        distributions=kinds,
        user_attrs=fields["user"],
        system_attrs=fields["system"],
        intermediate_values=dict(fields["steps"]),
        trial_id=fields["id"],
    )


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _from_local(moment: datetime | None) -> str | None:
    """A time as Optuna hands it out, local without saying so, for somebody who lives elsewhere."""
    return None if moment is None else moment.astimezone(UTC).isoformat()


def _to_local(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).astimezone().replace(tzinfo=None)


_ENCODERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Lease": asdict,
    "Order": asdict,
    "Changes": _from_changes,
    "Ending": lambda ending: dict(vars(ending)),
    "FrozenTrial": _from_trial,
}
_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Lease": lambda fields: Lease(**fields),
    "Order": lambda fields: Order(**fields),
    "Changes": _to_changes,
    "Ending": lambda fields: Ending(**fields),
    "FrozenTrial": _to_trial,
}


def describe_error(error: Exception) -> str:
    """An error of the ledger as a call's details; ``raise_error`` raises it again."""
    row = error.row if isinstance(error, WorkerAliveError) else None
    fields = {"error": type(error).__name__, "text": str(error)[:DETAILS], "row": row}
    return json.dumps(fields if row is None else {**fields, "text": ""})


def raise_error(details: str) -> None:
    """Raise the ledger's error that a call's details tell; return if they tell none."""
    try:
        fields = json.loads(details)
        name, text = fields["error"], fields["text"]
    except (ValueError, TypeError, KeyError):
        return
    if name == "WorkerAliveError":
        raise WorkerAliveError(fields["row"])
    for kind in (LeaseLostError, SupersededError):
        if kind.__name__ == name:
            raise kind(text)
