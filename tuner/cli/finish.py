"""The end of a run: the verdict as a table, the files written, and what to type next."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tuner.cli.show import percent
from tuner.datasets import Data
from tuner.export import METRICS, Retrained, export, retrain, save_weights
from tuner.loaded import LoadedRecipe
from tuner.session import Session
from tuner.trainer import EpochResult
from tuner.verdict import COMPARED, decide

LABELS = {
    "tail_accuracy": "tail",
    "head_accuracy": "head",
    "accuracy": "overall",
    "balanced_accuracy": "balanced",
}

log = logging.getLogger(__name__)


def finish(session: Session, data: Data, device: str, folder: Path) -> None:
    """Judge the best recipe, write report and recipe into ``folder``, print the table."""
    from tuner.report import write_report

    verdict = decide(session, data, device=device)
    if verdict is None:
        print("no trial is complete, so there is nothing to compare; see: tuner trials")
        return
    report = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    files = export(session, data, folder / "best", device=device)
    write_report(session, report)
    console = Console()
    console.print(verdict_table(verdict))
    for line in conclusions(session, verdict):
        console.print(escape(line), soft_wrap=True)
    console.print(
        f"\nreport  {escape(str(report))}\nrecipe  {escape(str(files[0]))}", soft_wrap=True
    )
    name = session.file.name
    console.print(
        "\nnext:\n"
        f"  tuner trials {name}\n"
        f"  tuner train {files[0]}\n"
        f"  tuner dashboard\n"
        f'  python -c "import tuner; print(tuner.load_recipe({str(files[0])!r}).recipe.loss)"',
        markup=False,
        soft_wrap=True,
    )


def verdict_table(verdict: dict[str, Any]) -> Table:
    """Accuracies of plain cross-entropy and the best recipe, percent with 95 % intervals."""
    plain, best = verdict["rows"][:2]
    images = sum(verdict["counts"])
    table = Table(title=f"accuracy on the {verdict['part']} part ({images} images), 95 % intervals")
    table.add_column("%")
    for row in (plain, best):
        table.add_column(f"{row['name']}\ntrial {row['trial']}", justify="right", no_wrap=True)
    table.add_column("difference\npoints", justify="right", no_wrap=True)
    for metric in COMPARED:
        cells = [percent(r["metrics"][metric], r["intervals"].get(metric)) for r in (plain, best)]
        table.add_row(LABELS[metric], *cells, points(verdict["differences"].get(metric)))
    return table


def points(difference: dict[str, float] | None) -> str:
    """A difference in percentage points, with its interval."""
    if difference is None:
        return "–"
    estimate, low, high = (100 * difference[key] for key in ("estimate", "low", "high"))
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]"


def conclusions(session: Session, verdict: dict[str, Any]) -> list[str]:
    """What the table allows to say, and what it does not."""
    lines = []
    found = verdict["differences"].get(session.file.objective.metric)
    if found is None:
        found = verdict["differences"].get("balanced_accuracy")
    if verdict["best"] == verdict["baseline"]:
        lines.append("Nothing that was tried is better than plain cross-entropy.")
    elif found is not None:
        label = LABELS.get(session.file.objective.metric, "balanced")
        sure = found["low"] > 0 or found["high"] < 0
        lines.append(
            f"The recipes differ in {label} accuracy by {points(found)} points."
            if sure
            else f"These images do not show a difference in {label} accuracy."
        )
    free = verdict["rows"][2]
    lines.append(
        f"Adjusting the logits of plain cross-entropy after training (tau = {free['tau']:.2f}), "
        f"which costs nothing, gives tail {percent(free['metrics']['tail_accuracy'])} and overall "
        f"{percent(free['metrics']['accuracy'])}."
    )
    seen, now = verdict["validation_value"], verdict["test_value"]
    if seen is not None and now is not None and verdict["part"] == "test":
        lines.append(
            f"The search saw {percent(seen)} on validation and picked it for being high; "
            f"unseen images give {percent(now)}."
        )
    return lines


def retrained(
    loaded: LoadedRecipe, path: Path, root: Path | None, device: str, output: Path | None
) -> None:
    """Train a recipe again and say whether its stored metrics came out."""
    stored_path = path.parent / METRICS
    stored = json.loads(stored_path.read_text()) if stored_path.exists() else None
    data = loaded.recipe.data.build(root)
    result = retrain(
        loaded,
        data.to(device) if device != "cpu" else data,
        device=device,
        stored=stored,
        on_epoch=_log_epoch,
    )
    _print_retrained(result, stored_path)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        save_weights(output / "model.safetensors", result.lane, data)
        metrics = {"raw": result.assessment.raw, "adjusted": result.assessment.adjusted}
        text = json.dumps({"validation": metrics, "tau": result.assessment.tau}, indent=2)
        (output / METRICS).write_text(text + "\n", encoding="utf-8")
        print(f"weights and metrics are in {output}")


def _log_epoch(result: EpochResult) -> None:
    log.info("epoch %d loss %.4f", result.epoch, result.train_loss)


def _print_retrained(result: Retrained, stored: Path) -> None:
    table = Table(title="validation accuracy in %")
    for column in ("", *LABELS.values()):
        table.add_column(column, justify="right")
    for name, metrics in (("raw", result.assessment.raw), ("adjusted", result.assessment.adjusted)):
        table.add_row(name, *(percent(metrics[m]) for m in LABELS))
    Console().print(table)
    difference = result.largest_difference
    if difference is None:
        print(f"no stored metrics beside the recipe ({stored}), so nothing to compare with")
    elif difference == 0:
        print(f"reproduced: every metric equals {stored}")
    else:
        print(f"largest difference to {stored}: {difference:.2e}")
