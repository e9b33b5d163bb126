"""All checks, one after another: of the storage, the machine, the artifacts and the study."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from tuner.doctor import _machine, _speeds, _storage, _study
from tuner.doctor._finding import Finding, fail
from tuner.errors import TunerError

Check = Callable[[], Iterator[Finding]]


@dataclass(frozen=True)
class Patient:
    """What is to be examined.

    ``study`` is a name or a study file; ``given`` says that the storage's URL stood in the
    command line, where others can read it.
    """

    url: str
    artifacts: str | None = None
    study: str | None = None
    data: Path | None = None
    given: bool = False


def examine(patient: Patient) -> Iterator[Finding]:
    """What the checks find, one by one as they are made; nothing is left behind."""
    checks: list[tuple[str, Check]] = [
        ("program", _machine.program),
        ("processor", _machine.processor),
        ("gpu", _machine.gpu),
        ("storage", lambda: _storage.storage(patient.url, patient.given)),
        ("artifacts", lambda: _machine.artifacts(patient.artifacts)),
    ]
    if patient.study is None:
        checks.append(("speed", _speeds.known_speeds))
    else:
        examined = partial(_study.study, patient.study, patient.url, patient.data)
        checks.append(("study", examined))
    for name, check in checks:
        yield from _guarded(name, check)


def _guarded(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check; one that cannot be made is one, too."""
    try:
        yield from check()
    except TunerError as error:
        yield fail(name, str(error), "see the message")
    except SQLAlchemyError as error:
        text = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        yield fail(name, f"the database said: {text}", "look at the server's log")
    except (OSError, RuntimeError, ValueError) as error:
        yield fail(name, f"this could not be found out: {error!r}", "report it")
