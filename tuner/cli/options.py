"""Options and arguments that several commands share, and what they stand for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuner.session import Session

PATIENCE = 30.0

log = logging.getLogger(__name__)

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, or its file.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Storage URL (default: TUNER_STORAGE, OPTUNA_STORAGE, sqlite:///runs/tuner.db)",
        show_default=False,
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option("--data", envvar="TUNER_DATA", help="Folder that data roots are relative to."),
]
Artifacts = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        help="Folder or s3://BUCKET/PREFIX of weights, logits and checkpoints "
        "(default: TUNER_ARTIFACTS, runs/artifacts)",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)"),
]
Lanes = Annotated[
    int | None,
    typer.Option(
        "--lanes",
        min=1,
        help="Trials side by side in each slot on a GPU, at most (default: TUNER_LANES, else as "
        "the probe finds)",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def joined(
    study: str,
    storage: str | None,
    artifacts: str | None,
    *,
    writes: bool = False,
    check: bool | None = None,
    lasting: bool = False,
    quiet: bool = False,
) -> Session:
    """The session of a study that is given by its name or by its study file.

    Who only reads it does not look into its artifacts: they may be out of reach. ``check`` says
    otherwise. Who reads tables of a newer Tuner is told so, unless ``quiet``. A storage that goes
    away is waited for, but not for long unless the command is a ``lasting`` one: somebody looks
    on.
    """
    from tuner.recipe import read_toml
    from tuner.session import join
    from tuner.storage import storage_url
    from tuner.stores import open_store

    name = str(read_toml(Path(study)).get("name")) if study.endswith(".toml") else study
    store = open_store(artifacts, check=writes if check is None else check)
    session = join(name, storage_url(storage), store, writes=writes)
    if not lasting:
        session.ledger.patience = PATIENCE
    if not writes and not quiet:
        _warn_of_newer(session, storage_url(storage))
    return session


def _warn_of_newer(session: Session, url: str) -> None:
    """Say that a storage is a newer Tuner's, of which this one may not see everything."""
    from tuner.ledger import newer
    from tuner.remote import is_remote

    if not is_remote(url) and newer(session.ledger.engine) is not None:
        log.warning(
            "the storage is a newer Tuner's: its workers and orders are not shown, and to change "
            "anything takes that Tuner"
        )


def chosen_device(device: str | None) -> str:
    """The device to use, checked."""
    import torch

    from tuner.errors import TunerError

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    refuse_unfit(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        if said.startswith(("Expected one of", "Invalid device")):
            said = "no device has such a name; give cpu, cuda or cuda:1, or leave it out"
        raise TunerError(f"--device {device}: {said}") from None
    return device


def refuse_unfit(device: str | None) -> None:
    """Refuse a device that Tuner cannot train on, on whatever machine.

    Raises:
        TunerError: It lacks what training needs.
    """
    from tuner.errors import TunerError

    if device is not None and device.partition(":")[0] == "mps":
        raise TunerError(
            f"--device {device}: Tuner sums losses in float64, which mps lacks; give --device cpu"
        )
