"""What claiming and ending many trials costs one by one and together, on storages near and far."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import count
from statistics import median

import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState
from storage_history import SPACE, Databases, attributes

from tuner.engines import make_engine
from tuner.ledger import Changes, Ending, Lease, Ledger
from tuner.pulse import facts

SIZE = 128
AWAY = (0.0, 0.001, 0.005)
RUNG = "head"

Worker = tuple[str, int]
Way = Callable[[Ledger, Worker], None]


def cohorts_table(bases: Databases, repeats: int) -> str:
    """A Markdown table: statements and milliseconds per trial, by how far a statement goes."""
    lines = [
        f"| ms to the server | one by one: statements, ms | {SIZE} together | times faster |",
        "|---|---|---|---|",
    ]
    for away in AWAY if bases.kind != "sqlite" else AWAY[:1]:
        pairs = range(repeats)
        found = [tuple(_measure(bases, way, away) for way in (alone, together)) for _ in pairs]
        ratios = sorted(one[1] / many[1] for one, many in found)
        cells = []
        for side in zip(*found, strict=True):
            times = sorted(seconds for _, seconds in side)
            spread = f"({1000 * times[0]:.2f}–{1000 * times[-1]:.2f})"
            cells.append(f"{side[0][0]:.2f}, {1000 * median(times):.2f} {spread}")
        faster = f"{median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f})"
        lines.append(f"| {1000 * away:g} | {cells[0]} | {cells[1]} | {faster} |")
    return "\n".join(lines)


def _measure(bases: Databases, way: Way, away: float) -> tuple[float, float]:
    """Statements and seconds per trial; every statement takes ``away`` seconds longer."""
    url = bases.clone(0)
    engine, sent = make_engine(url), count()
    ledger = Ledger(engine, 1)
    # What is made once is not measured.
    way(ledger, _ticketed(ledger))
    worker = _ticketed(ledger)

    def note(*_: object) -> None:
        next(sent)
        time.sleep(away)

    sa.event.listen(engine, "before_cursor_execute", note)
    began = time.perf_counter()
    way(ledger, worker)
    seconds = time.perf_counter() - began
    engine.dispose()
    bases.drop(url)
    return next(sent) / SIZE, seconds / SIZE


def _ticketed(ledger: Ledger) -> Worker:
    """A worker, and trials for it."""
    tickets: list[tuple[dict[str, str], dict[str, str]]] = [({}, {"fidelity": RUNG})] * SIZE
    assert ledger.enqueue(tickets, len(ledger.trials()))
    return "worker", ledger.register("worker", facts("cpu"), dead=True)


def together(ledger: Ledger, worker: Worker) -> None:
    """Claim, read and end trials as a cohort."""
    first = ledger.claim(worker)
    assert first is not None
    leases = [first, *ledger.claim_alike(worker, RUNG, SIZE - 1)]
    ledger.by_ids([lease.trial_id for lease in leases])
    endings = [Ending(lease, _changes(lease), "PRUNED", "pruned", [0.5]) for lease in leases]
    assert ledger.finish_all(endings) == []


def alone(ledger: Ledger, worker: Worker) -> None:
    """Claim, read and end trials one after another."""
    while (lease := ledger.claim(worker)) is not None:
        ledger.trial(lease.trial_id)
        changes = _changes(lease)
        ledger.finish(lease, changes, state=TrialState.PRUNED, values=[0.5], end="pruned")


def _changes(lease: Lease) -> Changes:
    """What a trial of the head rung writes."""
    params = {name: (0.0, distribution_to_json(kind)) for name, kind in SPACE.items()}
    user = dict(attributes(random.Random(lease.number)))
    return Changes(params=params, user=user, steps={0: 0.5})
