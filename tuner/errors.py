"""Errors a user can cure; the command line prints their text and exits with 1."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping

SHOWN_LENGTH = 80


class TunerError(Exception):
    """Base of every error whose text names what is wrong, where, and the way out."""


class StudyFileError(TunerError):
    """A study or recipe file that cannot be read or does not validate."""


class DataError(TunerError):
    """Data that are missing, broken, or not the data the study was created with."""


class StorageError(TunerError):
    """A storage that cannot be opened, or that holds something else than expected.

    ``passes`` says that it is away rather than wrong: who has the time tries again.
    """

    def __init__(self, text: str = "", *, passes: bool = False) -> None:
        super().__init__(text)
        self.passes = passes


class NameTakenError(TunerError):
    """The name of a worker that another one has, which is alive."""


class UnknownNameError(TunerError):
    """A name that no component is registered under."""


class NonFiniteError(TunerError):
    """A training loss that became NaN or infinite."""


def unknown_name(what: str, name: str, known: Iterable[str], otherwise: str = ".") -> str:
    """Say that ``name`` is not a known ``what``, with the closest of the known names.

    Where none is close, it says ``otherwise``.
    """
    if "smote" in name.lower():
        return f"no {what} {name!r}: {SMOTE_REFUSAL}"
    return f"unknown {what} {name!r}{close_match(name, known, otherwise)}"


def close_match(name: str, known: Iterable[str], otherwise: str = ".") -> str:
    """End of a sentence about a wrong name: the closest known name, and all of them."""
    known = sorted(known)
    if not known:
        return "; there are none here"
    lowered = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    hint = f"; did you mean {lowered[close[0]]!r}?" if close else otherwise
    return f"{hint} Known: {', '.join(known)}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 image``, ``2 images``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def shown(value: object) -> str:
    """A value as a TOML file writes it, shortened to ``SHOWN_LENGTH`` characters."""
    text = _toml(value)
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 1] + "…"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{key} = {_toml(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return str(value)


SMOTE_REFUSAL = (
    "on pixels SMOTE makes a ghost image of two and gives it one hard label, as if it were a new "
    "member of the class; mixup mixes the labels with the pixels, and remix leans them towards "
    "the rarer class. For more of the tail use these or the class_aware sampler, or rebalance "
    "in feature space by training the head alone"
)
