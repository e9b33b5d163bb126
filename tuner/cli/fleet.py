"""Commands for all workers of a study at once: stop, pause, resume, retry, reap, workers."""

from __future__ import annotations

import getpass
import json
import socket
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import app
from tuner.cli.options import Json, Storage, StudyName, joined

if TYPE_CHECKING:
    from tuner.ledger import Order
    from tuner.session import Session

LONGEST_REASON = 200

Reason = Annotated[
    str | None, typer.Option("--reason", help="Why; tuner status shows it to everybody.")
]


@app.command(rich_help_panel="Fleet")
def stop(study: StudyName, reason: Reason = None, storage: Storage = None) -> None:
    """Tell every worker to keep its trial's state, put it back and leave."""
    session = joined(study, storage, None, writes=True, check=False)
    _order(session, "stop", reason)
    told = _told(session, "leave")
    if told:
        print(told)
    else:
        print("no worker is there; one that starts leaves at once")
    print(f"to go on: tuner resume {session.file.name}")


@app.command(rich_help_panel="Fleet")
def pause(study: StudyName, reason: Reason = None, storage: Storage = None) -> None:
    """Tell every worker to put its trial back and wait, its data still loaded."""
    session = joined(study, storage, None, writes=True, check=False)
    _order(session, "pause", reason)
    told = _told(session, "wait")
    if told:
        print(told)
    else:
        print("no worker is there; one that starts waits")
    print(f"to go on: tuner resume {session.file.name}")


def _order(session: Session, state: str, reason: str | None) -> None:
    who = f"{getpass.getuser()} on {socket.gethostname()}"
    text = None if reason is None else reason.strip()[:LONGEST_REASON]
    session.ledger.give_order(state, text or None, f"told by {who}")


def _told(session: Session, last: str) -> str | None:
    """How many workers hear an order, and what they do, ``last`` at last; None: there are none."""
    from tuner.pulse import BEATS_PER_LEASE

    rows = present(session)
    if not rows:
        return None
    pause = max(row["lease_until"] - row["heartbeat_at"] for row in rows) / BEATS_PER_LEASE
    if len(rows) == 1:
        does = "it finishes the step at hand, keeps its trials' state, puts the trials back and"
        return f"1 worker hears it within {pause:.0f} s: {does} {last}s"
    do = "they finish the step at hand, keep their trials' state, put the trials back and"
    return f"{len(rows)} workers hear it within {pause:.0f} s: {do} {last}"


def present(session: Session) -> list[dict[str, Any]]:
    """Workers that are alive, as far as anybody knows."""
    if not session.ledger.ready():
        return []
    return [row for row in session.ledger.workers() if row["state"] not in ("left", "lost")]


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


@app.command(rich_help_panel="Fleet")
def resume(study: StudyName, storage: Storage = None) -> None:
    """Let workers work again, whatever stopped or paused them."""
    from tuner.goals import reached

    session = joined(study, storage, None, writes=True, check=False)
    before = session.ledger.standing()
    session.ledger.give_order("run")
    was = "neither stopped nor paused" if before.state == "run" else described(before)
    print(f"{session.file.name} was {was}")
    if before.reason == "code_error":
        print(f"to try what failed again: tuner retry {session.file.name} --failed")
    now = session.ledger.order()
    if now.state != "run":
        print(f"it is {described(now)} again at once: the study file's limit stands")
        return
    goal = reached(session)
    if goal is not None:
        print(f"its goal stands ({goal[1]}): the next complete trial stops it again")
    there = len(present(session))
    if there:
        print(f"{_count(there, 'worker goes', 'workers go')} on as soon as it is heard")
    else:
        print(_nobody(session))


def described(order: Order) -> str:
    """An order in words: stopped or paused, why, and by whom."""
    from tuner.cli.show import STOPPED_BY

    word = {"stop": "stopped", "pause": "paused"}.get(order.state, "running")
    known = STOPPED_BY.get(order.reason or "")
    if known is not None:
        last = (order.detail or "").strip().splitlines()[-1:]
        return ": ".join([f"{word} by {known}", *last])
    parts = [part for part in (order.reason, order.detail) if part]
    return f"{word} ({'; '.join(parts)})" if parts else word


@app.command(rich_help_panel="Fleet")
def retry(
    study: StudyName,
    failed: Annotated[bool, typer.Option("--failed", help="Those that failed.")] = False,
    storage: Storage = None,
) -> None:
    """Queue trials again that ended without a result, beyond the budget."""
    from tuner.tickets import retry_failed

    if not failed:
        raise typer.BadParameter("say which trials: --failed")
    session = joined(study, storage, None, writes=True, check=False)
    numbers = retry_failed(session)
    if not numbers:
        print("no trial failed that was not queued again already")
        return
    new = {t.user_attrs.get("retry_of"): t.number for t in session.trials()}
    pairs = ", ".join(f"{number} as trial {new[number]}" for number in numbers)
    print(f"{_count(len(numbers), 'trial waits', 'trials wait')} again: {pairs}")
    _say_who_takes_them(session)


@app.command(rich_help_panel="Fleet")
def reap(
    study: StudyName,
    watch: Annotated[
        float | None, typer.Option("--watch", min=0.1, help="Look again every so many seconds.")
    ] = None,
    storage: Storage = None,
) -> None:
    """Put the trials of dead workers back into the queue; workers do so by themselves."""
    session = joined(study, storage, None, writes=True, check=False)
    if watch is None:
        if not _reap(session, overdue=True):
            held = session.ledger.running()
            busy = f"; {_count(held, 'is', 'are')} being worked on" if held else ""
            print(f"no trial has lost its worker{busy}")
        return
    _watch(session, watch)


def _watch(session: Session, seconds: float) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    from tuner.cli.failures import curable
    from tuner.pulse import BEATS_PER_LEASE, Contact

    lease = session.ledger.lease_seconds
    contact, pause = Contact(lease), min(seconds, lease / BEATS_PER_LEASE)
    print(f"looking every {pause:g} s; Ctrl-C ends it", flush=True)
    while True:
        try:
            _reap(session, overdue=contact.is_steady())
        except SQLAlchemyError as error:
            print(f"trying again: {curable(error)}", flush=True)
        time.sleep(pause)


def _reap(session: Session, *, overdue: bool) -> list[int]:
    from tuner.pulse import gone

    numbers = session.ledger.reap(gone(session.ledger), overdue=overdue)
    for number in numbers:
        trial = next(t for t in session.trials() if t.number == number)
        ended = trial.user_attrs.get("detail", "") if trial.state.is_finished() else ""
        then = f"it is given up: {ended}" if ended else "it goes on from its last checkpoint"
        print(f"trial {number} has lost its worker; {then}", flush=True)
    return numbers


def _say_who_takes_them(session: Session) -> None:
    order, there = session.ledger.standing(), len(present(session))
    if order.state != "run":
        print(f"the study is {described(order)}; to go on: tuner resume {session.file.name}")
    elif there:
        print(f"{_count(there, 'worker is', 'workers are')} there to take them")
    else:
        print(_nobody(session))


def _nobody(session: Session) -> str:
    """That there is no worker, and what to type if there is work."""
    from tuner.worker import progress

    counts = progress(session)
    if (
        counts["waiting"] + counts["running"]
        or sum(counts[s] for s in ("complete", "pruned", "fail")) < counts["budget"]
    ):
        return f"no worker is there; start some: tuner worker {session.file.name}"
    return "no worker is there, and no trial waits"


@app.command(rich_help_panel="Fleet")
def workers(
    study: StudyName,
    storage: Storage = None,
    everyone: Annotated[bool, typer.Option("--all", help="Those that left, too.")] = False,
    as_json: Json = False,
) -> None:
    """Who is there: on what, doing what, at what speed, and silent since when."""
    from rich.table import Table

    from tuner.cli.show import wide_console

    session = joined(study, storage, None)
    rows = worker_rows(session)
    if not everyone:
        rows = [row for row in rows if row["state"] != "left"]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not rows:
        print(_nobody(session))
        return
    table = Table()
    for column in ("worker", "host", "process", "device", "state", "trial", "epoch", "samples/s"):
        table.add_column(column, no_wrap=column == "worker")
    table.add_column("heard of", justify="right")
    for row in rows:
        shown = [row["worker"], row["host"], row["process"], row["device"], row["state"]]
        speed = None if row["samples_per_second"] is None else f"{row['samples_per_second']:.0f}"
        shown += [row["trial"], row["epoch"], speed, f"{row['silent']:.0f} s ago"]
        table.add_row(*("" if cell is None else str(cell) for cell in shown))
    wide_console().print(table)


def worker_rows(session: Session) -> list[dict[str, Any]]:
    """Every worker the study had, as programs read it."""
    if not session.ledger.ready():
        return []
    numbers = {t._trial_id: t.number for t in session.trials()}
    return [
        {
            "worker": row["worker_id"],
            "host": row["host"],
            "process": row["pid"],
            "device": row["device"],
            "state": row["state"],
            "trial": numbers.get(row["trial_id"]),
            "epoch": row["epoch"],
            "samples_per_second": row["speed"],
            "silent": round(row["silent"], 1),
            "since": row["since"],
            **row["facts"],
        }
        for row in session.ledger.workers()
    ]
