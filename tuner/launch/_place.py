"""Where a study and its files are, as workers on other machines are told."""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from tuner.errors import TunerError
from tuner.remote import is_remote
from tuner.storage import storage_url
from tuner.stores import DEFAULT
from tuner.urls import parse_url

CREDENTIALS = ("AWS_", "PG", "TUNER_")


@dataclass(frozen=True)
class Place:
    """A study's name, and the settings under which a process anywhere finds it.

    ``given`` are what the command line and the environment here say about the study's places;
    ``credentials`` are other settings of databases and buckets from this environment, for
    machines that have none of their own. Neither is shown when the object is.
    """

    study: str
    given: dict[str, str] = field(repr=False)
    credentials: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def here(
        cls, study: str, storage: str | None, data: Path | None, artifacts: str | None
    ) -> Place:
        """The place as this process has it; folders become absolute."""
        artifacts = artifacts or os.environ.get("TUNER_ARTIFACTS") or DEFAULT
        given = {
            "TUNER_STORAGE": _absolute_storage(storage_url(storage)),
            "TUNER_ARTIFACTS": artifacts if ":/" in artifacts else str(Path(artifacts).absolute()),
        }
        if data is not None:
            given["TUNER_DATA"] = str(data.absolute())
        settings = {k: v for k, v in os.environ.items() if k.startswith(CREDENTIALS)}
        return cls(study, given, {k: v for k, v in settings.items() if k not in given})

    def enter(self, environment: MutableMapping[str, str]) -> None:
        """Put the settings into ``environment``; credentials that it has already are kept."""
        environment.update(self.given)
        for key, value in self.credentials.items():
            environment.setdefault(key, value)

    def check_reach(self, hosts: Iterable[str]) -> None:
        """See that workers on all of ``hosts`` can share the storage.

        Raises:
            TunerError: It is a SQLite file, and there are several machines.
        """
        names = sorted(set(hosts))
        if len(names) > 1 and _is_sqlite(self.given["TUNER_STORAGE"]):
            raise TunerError(
                f"the storage is a SQLite file, which one machine can share, but the workers are "
                f"on several ({', '.join(names)}); give PostgreSQL, MySQL or a tuner proxy with "
                "--storage or TUNER_STORAGE"
            )


def _is_sqlite(url: str) -> bool:
    return not is_remote(url) and parse_url(url).get_backend_name() == "sqlite"


def _absolute_storage(url: str) -> str:
    if not _is_sqlite(url):
        return url
    parsed = parse_url(url)
    path = str(Path(parsed.database or "").absolute())
    return parsed.set(database=path).render_as_string(hide_password=False)
