"""Components of other packages: modules that their entry points name, imported once a process.

Only what is installed is imported, by the rules of Python's packages. No study file, recipe or
database can name code: they name components, which are known here or not.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from threading import RLock

from tuner.errors import TunerError

GROUP = "tuner.components"


class Packages:
    """The modules of a group of entry points."""

    def __init__(self, group: str = GROUP) -> None:
        self.group = group
        self.lock = RLock()
        self.begun = self.done = False
        self.failure: TunerError | None = None

    def load(self) -> None:
        """Import all modules, unless it was done; they register their components by that.

        They are imported in the order of the packages' names, then of the entry points'. Whatever
        one of them asks for meanwhile is answered from what is there by then.

        Raises:
            TunerError: A module cannot be imported, or registers a name that is taken; every time.
        """
        if not self.done:
            with self.lock:
                if not self.begun:
                    self.begun = True
                    self.failure = _first_failure(self.group)
                    self.done = True
        if self.failure is not None:
            raise self.failure.with_traceback(None)


PACKAGES = Packages()


def _first_failure(group: str) -> TunerError | None:
    for entry in sorted(entry_points(group=group), key=_place):
        try:
            entry.load()
        except Exception as error:
            failure = TunerError(_said(entry, error))
            failure.__cause__ = error
            return failure
    return None


def _place(entry: EntryPoint) -> tuple[str, str, str]:
    return _package(entry), entry.name, entry.value


def _package(entry: EntryPoint) -> str:
    return "?" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _said(entry: EntryPoint, error: Exception) -> str:
    return (
        f"the components of the package {_package(entry)} (entry point {entry.name} = "
        f"{entry.value}) cannot be loaded: {type(error).__name__}: {error}; mend that package, or "
        "uninstall it"
    )
