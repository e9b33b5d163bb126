"""Commands that make something to look at or to use: export, report, dashboard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import app
from tuner.cli.options import (
    Artifacts,
    DataFolder,
    Device,
    Storage,
    StudyName,
    chosen_device,
    joined,
)

log = logging.getLogger(__name__)


@app.command()
def export(
    study: StudyName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    trial: Annotated[int | None, typer.Option("--trial", help="Trial (default: the best)")] = None,
    storage: Storage = None,
    data: DataFolder = None,
    artifacts: Artifacts = None,
    device: Device = None,
) -> None:
    """Write the best trial as recipe, weights, metrics and model card."""
    from tuner import export as exports
    from tuner.cli.failures import naming
    from tuner.fit import check_data

    session = joined(study, storage, artifacts, writes=True)
    exports.find_trial(session, trial)
    with naming(f"study {session.file.name}"):
        loaded = session.file.data.build(data)
    check_data(session.study.user_attrs, loaded, session.file.name)
    for path in exports.export(session, loaded, output, number=trial, device=chosen_device(device)):
        print(path)


@app.command()
def report(
    study: StudyName,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.")] = Path(
        "report.html"
    ),
    storage: Storage = None,
    artifacts: Artifacts = None,
) -> None:
    """Write one self-contained HTML page about the study."""
    from tuner.report import write_report

    write_report(joined(study, storage, artifacts), output)
    print(output)


@app.command()
def dashboard(
    storage: Storage = None,
    artifacts: Artifacts = None,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8080,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Serve others too; there is no login.")
    ] = False,
    in_container: Annotated[
        bool,
        typer.Option(
            "--in-container",
            help="Listen where --host says, and answer to the name localhost only.",
        ),
    ] = False,
) -> None:
    """Serve optuna-dashboard, read-only, and the report of every study."""
    from tuner.storage import open_storage, storage_url
    from tuner.web import dashboard_app, serve

    opened = open_storage(storage_url(storage), create=False, writes=False)
    application = dashboard_app(opened, load_session=lambda name: joined(name, storage, artifacts))
    serve(application, host, port, allow_remote=allow_remote, in_container=in_container)
