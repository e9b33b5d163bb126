"""Commands around the storage: doctor, proxy."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from tuner.cli import app
from tuner.cli.options import Artifacts, DataFolder, Json, Storage


@app.command(rich_help_panel="Fleet")
def proxy(
    storage: Storage = None,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 13000,
    connections: Annotated[
        int, typer.Option("--connections", min=1, help="To the database, shared by all workers.")
    ] = 8,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Answer others too; set TUNER_PROXY_TOKEN.")
    ] = False,
) -> None:
    """Stand between many workers and a database that has few connections."""
    from tuner.remote import require_grpc
    from tuner.storage import storage_url

    require_grpc()
    from tuner.proxy._server import serve

    serve(
        storage_url(storage),
        host,
        port,
        connections=connections,
        allow_remote=allow_remote,
        announce=lambda line: print(line, flush=True),
    )


@app.command(rich_help_panel="Fleet")
def doctor(
    study: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="A study's name, or its file.")
    ] = None,
    storage: Storage = None,
    data: DataFolder = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """Look at the storage, this machine and the study, and say what to do; 1 if anything fails."""
    from tuner.doctor import Finding, Patient, examine
    from tuner.storage import storage_url

    patient = Patient(storage_url(storage), artifacts, study, data, given=storage is not None)
    found: list[Finding] = []
    for finding in examine(patient):
        found.append(finding)
        if not as_json:
            print(f"{finding.level:<5} {finding.check:<12} {finding.found}", flush=True)
            if finding.cure:
                print(f"{'':<18} → {finding.cure}", flush=True)
    fails = sum(finding.level == "fail" for finding in found)
    if as_json:
        print(json.dumps({"ok": not fails, "checks": [asdict(f) for f in found]}, indent=2))
    if fails:
        raise typer.Exit(1)
