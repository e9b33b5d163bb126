"""Answers calls of ledgers from the database: one method, and a fixed list of what it may do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc
from optuna.trial import TrialState
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from tuner.engines import passes
from tuner.ledger import LeaseLostError, Ledger, Limits, SupersededError, WorkerAliveError
from tuner.proxy import _wire
from tuner.urls import without_password

# The worker is the one who is patient: a call that waits holds a thread that others need.
PATIENCE = 2.0
PROGRESS = {"seconds", "speed", "first_epoch", "note"}
REPORTED = {"end", "reason", "detail", "values"}
MOST_LEDGERS = 256

log = logging.getLogger(__name__)


class LedgerService(grpc.GenericRpcHandler):
    """Ledgers of all studies of one database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ledgers: dict[tuple[Any, ...], Ledger] = {}
        self._lock = threading.Lock()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Answer our one method."""
        if handler_call_details.method != _wire.CALL:
            return None
        return grpc.unary_unary_rpc_method_handler(self.call)

    def call(self, content: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer one call, or end it with what went wrong."""
        if not context.is_active():
            # Who asked has given up, and asks again.
            context.abort(grpc.StatusCode.CANCELLED, "too late")
        try:
            return self._answer(_wire.loads(content), context)
        except (LeaseLostError, SupersededError, WorkerAliveError) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, _wire.describe_error(error))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("a call that is none was refused: %r", error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a call: {error!r}"[:500])
        except SQLAlchemyError as error:
            code = grpc.StatusCode.UNAVAILABLE if passes(error) else grpc.StatusCode.INTERNAL
            log.warning("the database: %s", self._first_line(error))
            context.abort(code, f"the database: {self._first_line(error)}")
        raise AssertionError("abort raises")

    def _first_line(self, error: SQLAlchemyError) -> str:
        text = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        return without_password(text, self.engine.url)[:500]

    def _answer(self, call: dict[str, Any], context: grpc.ServicerContext) -> bytes:
        if call["protocol"] != _wire.PROTOCOL:
            raise ValueError(f"protocol {call['protocol']}, this proxy speaks {_wire.PROTOCOL}")
        method, options = call["method"], call["options"]
        if method not in _wire.METHODS:
            raise ValueError(f"{method!r} is no method of a ledger")
        ledger = self._ledger(call["study"], call["limits"], call["lease"])
        answer = _PREPARED.get(method, _as_it_is)(
            getattr(ledger, method), call["arguments"], options
        )
        if method in ("ended_after", "attempts"):
            context.set_compression(grpc.Compression.Gzip)
        return _wire.dumps(answer)

    def _ledger(self, study_id: int, limits: list[float | None], lease: float) -> Ledger:
        """The ledger of a study, which remembers its trials; the oldest makes way for a new one."""
        if not 0 < lease < 86_400:
            raise ValueError(f"a lease of {lease} s")
        key = (int(study_id), *limits, float(lease))
        with self._lock:
            if key not in self._ledgers:
                if len(self._ledgers) >= MOST_LEDGERS:
                    self._ledgers.pop(next(iter(self._ledgers)))
                hours = Limits(gpu_hours=limits[0], hours=limits[1])
                ledger = Ledger(self.engine, int(study_id), limits=hours, lease_seconds=lease)
                ledger.patience = PATIENCE
                self._ledgers[key] = ledger
            return self._ledgers[key]


def _as_it_is(method: Callable[..., Any], arguments: list[Any], options: dict[str, Any]) -> Any:
    return method(*arguments, **options)


def _write(method: Callable[..., Any], arguments: list[Any], options: dict[str, Any]) -> Any:
    _refuse_others(options, PROGRESS)
    return method(*arguments, **options)


def _finish(method: Callable[..., Any], arguments: list[Any], options: dict[str, Any]) -> Any:
    state = TrialState[options.pop("state")]
    _refuse_others(options, PROGRESS | REPORTED)
    return method(*arguments, state=state, **options)


def _unfinished(method: Callable[..., Any], arguments: list[Any], _: dict[str, Any]) -> Any:
    return method([TrialState[name] for name in arguments[0]])


def _refuse_others(options: dict[str, Any], known: set[str]) -> None:
    if set(options) - known:
        raise ValueError(f"unknown: {', '.join(sorted(set(options) - known))}")


_PREPARED = {"write": _write, "finish": _finish, "unfinished": _unfinished}
