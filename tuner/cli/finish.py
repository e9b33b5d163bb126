"""The end of a run: the verdict as a table, the files written, and what to type next."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tuner.cli.confirmed import confirmed_lines, confirmed_table
from tuner.cli.show import percent
from tuner.confirmation import ONE_TRAINING_EACH, p_value
from tuner.datasets import Data
from tuner.doubts import cautions
from tuner.errors import counted
from tuner.export import METRICS, Retrained, export, retrain, save_weights
from tuner.loaded import LoadedRecipe
from tuner.rounds import is_decided
from tuner.session import Session
from tuner.tickets import ladder_state
from tuner.trainer import EpochResult
from tuner.urls import masked
from tuner.verdict import COMPARED, decide

LABELS = {
    "tail_accuracy": "tail",
    "head_accuracy": "head",
    "accuracy": "overall",
    "balanced_accuracy": "balanced",
}

LEVEL = 0.05

log = logging.getLogger(__name__)


def finish(
    session: Session, data: Data, device: str, folder: Path, options: Mapping[str, object]
) -> None:
    """Judge the best recipe, write report and recipe into ``folder``, print the table.

    ``options`` are those that said where things are: the next commands repeat them.
    """
    from tuner.report import write_report

    if session.best() is None:
        print(f"no trial is complete; why they ended: tuner trials {session.file.name}")
        return
    verdict = decide(session, data, device=device)
    report = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    files = export(session, data, folder / "best", device=device)
    write_report(session, report)
    console = Console()
    if verdict is None:
        console.print("plain cross-entropy has no complete trial, so there is nothing to compare")
    else:
        console.print(verdict_table(verdict))
        for line in conclusions(session, verdict):
            console.print(escape(line), soft_wrap=True)
        _print_confirmed(console, session, verdict)
    console.print(
        f"\nreport  {escape(str(report))}\nrecipe  {escape(str(files[0]))}", soft_wrap=True
    )
    ladder = ladder_state(session)
    if ladder:
        console.print("", *ladder, sep="\n", soft_wrap=True, markup=False)
    steps = [
        command("trials", session.file.name, {k: options[k] for k in ("storage", "artifacts")}),
        command("train", str(files[0]), {"data": options["data"]}),
        command("dashboard", "", {k: options[k] for k in ("storage", "artifacts")}),
    ]
    console.print(
        "\nnext:", *(f"  {step}" for step in steps), sep="\n", markup=False, soft_wrap=True
    )


def _print_confirmed(console: Console, session: Session, verdict: Mapping[str, Any]) -> None:
    found, metric = verdict.get("confirmed"), session.file.objective.metric
    if found:
        console.print(confirmed_table(found, metric))
        for line in confirmed_lines(found, metric):
            console.print(escape(line), soft_wrap=True)
    elif session.file.ladder.confirms:
        why = (
            "no answer yet" if not is_decided(session) else "no answer, as all recipes failed there"
        )
        console.print(f"The confirm rung has {why}: this is what the search alone found.")


def command(name: str, argument: str, options: Mapping[str, object]) -> str:
    """A command to type, with the options that were given; a password stays hidden."""
    words = ["tuner", name, *([shlex.quote(argument)] if argument else [])]
    for key, value in options.items():
        if value is not None:
            text = masked(str(value)) if key == "storage" else str(value)
            words += [f"--{key}", shlex.quote(text)]
    return " ".join(words)


def verdict_table(verdict: dict[str, Any]) -> Table:
    """Accuracies of plain cross-entropy and the best recipe, percent with 95 % intervals."""
    plain, best = verdict["rows"][:2]
    images = counted(sum(verdict["counts"]), "image")
    table = Table(title=f"accuracy on the {verdict['part']} part ({images}), 95 % intervals")
    table.add_column("%")
    for row in (plain, best):
        table.add_column(f"{row['name']}\ntrial {row['trial']}", justify="right", no_wrap=True)
    table.add_column("difference\npoints", justify="right", no_wrap=True)
    for metric in dict.fromkeys((*COMPARED, verdict["objective"])):
        cells = [percent(r["metrics"][metric], r["intervals"].get(metric)) for r in (plain, best)]
        table.add_row(
            LABELS.get(metric, metric), *cells, points(verdict["differences"].get(metric))
        )
    return table


def points(difference: dict[str, float] | None) -> str:
    """A difference in percentage points, with its interval."""
    if difference is None:
        return "–"
    estimate, low, high = (100 * difference[key] for key in ("estimate", "low", "high"))
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]"


def conclusions(session: Session, verdict: dict[str, Any]) -> list[str]:
    """What the table allows to say, and what it does not."""
    metric = session.file.objective.metric
    lines = [_difference(metric, verdict), _free_gain(verdict)]
    lines += (f"note: {caution}" for caution in cautions(session))
    if verdict["part"] == "validation":
        lines.append(
            "There is no test part: these are the images the search chose by, so expect less on "
            "new ones. Set data.test_fraction to know."
        )
    elif verdict.get("confirmed"):
        pass  # What the search saw stands beside what fresh seeds gave.
    elif verdict["validation_value"] is not None and verdict["test_value"] is not None:
        seen, now = (amount(metric, verdict[k]) for k in ("validation_value", "test_value"))
        lines.append(
            f"Objective {metric}: {seen} on validation, where it was picked for being the best; "
            f"{now} on unseen images."
        )
    return lines


def _difference(metric: str, verdict: dict[str, Any]) -> str:
    if verdict["best"] == verdict["baseline"]:
        adjusted = verdict["rows"][1]["tau"] != 0
        return "The best recipe is plain cross-entropy itself" + (
            ", with its logits adjusted." if adjusted else "."
        )
    shown = metric if metric in verdict["differences"] else "balanced_accuracy"
    found = verdict["differences"][shown]
    sure = (found["low"] > 0 or found["high"] < 0) and found["p_value"] < LEVEL
    if not sure:
        chance = f"{p_value(found['p_value'])}, corrected for several metrics"
        return f"These images do not show a difference in {LABELS[shown]} accuracy ({chance})."
    text = f"The two models differ in {LABELS[shown]} accuracy by {points(found)} points."
    rivals = (verdict.get("confirmed") or {}).get("rivals", ())
    return f"{text} {ONE_TRAINING_EACH}" if verdict["baseline"] in rivals else text


def _free_gain(verdict: dict[str, Any]) -> str:
    row, differences = verdict["rows"][2], verdict["beyond_adjustment"]
    tail, overall = (percent(row["metrics"][m]) for m in ("tail_accuracy", "accuracy"))
    more, whole = (points(differences.get(m)) for m in ("tail_accuracy", "accuracy"))
    return (
        f"Adjusting the logits of plain cross-entropy after training (tau = {row['tau']:.2f}) "
        f"costs nothing and gives tail {tail}, overall {overall}; the best recipe differs from "
        f"that by {more} points in tail and {whole} overall."
    )


def amount(metric: str, value: float) -> str:
    """A metric's value as people read it: shares in percent, the likelihood as it is."""
    return f"{value:.3f}" if metric == "nll" else f"{percent(value)} %"


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
    _print_retrained(result, stored_path, stored)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        save_weights(output / "model.safetensors", result.lane, data)
        metrics = {"raw": result.assessment.raw, "adjusted": result.assessment.adjusted}
        text = json.dumps({"validation": metrics, "tau": result.assessment.tau}, indent=2)
        (output / METRICS).write_text(text + "\n", encoding="utf-8")
        print(f"weights and metrics are in {output}")


def _log_epoch(result: EpochResult) -> None:
    log.info("epoch %d loss %.4f", result.epoch, result.train_loss)


def _print_retrained(result: Retrained, path: Path, stored: Mapping[str, Any] | None) -> None:
    table = Table(title="validation accuracy in %")
    for column in ("", *LABELS.values()):
        table.add_column(column, justify="right")
    for name, metrics in (("raw", result.assessment.raw), ("adjusted", result.assessment.adjusted)):
        table.add_row(name, *(percent(metrics[m]) for m in LABELS))
    Console().print(table)
    difference = result.largest_difference
    if stored is None or difference is None:
        print(f"no stored metrics beside the recipe ({path}), so nothing to compare with")
    elif difference == 0:
        print(f"reproduced: every metric equals {path}")
    else:
        print(f"largest difference to {path}: {difference:.2e}")
    if stored is not None and stored.get("rung") == "head":
        print(
            f"{path} is of the head rung, where only the classifier was trained on frozen "
            "features; this was another training, so its metrics are not expected to come out"
        )
