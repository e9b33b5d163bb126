"""The model card beside an exported recipe: what it is, how good, how sure, how to use it."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial

from tuner.confirm import ROLE_NAMES
from tuner.confirmation import spread, unit
from tuner.datasets import Data
from tuner.evaluation import certainty
from tuner.imbalance import imbalance_ratio
from tuner.ladder import rung_of
from tuner.recipe import Recipe
from tuner.session import Session
from tuner.trained import stored_recipe

SHOWN = {
    "tail_accuracy": "tail",
    "head_accuracy": "head",
    "accuracy": "overall",
    "balanced_accuracy": "balanced",
    "worst_class": "worst class",
    "ece": "calibration error (ECE)",
}

HEAD_ONLY = (
    "Only the classifier was trained with this recipe, on frozen features; `tuner train` trains "
    "everything from scratch, which is not the same training."
)


def model_card(session: Session, trial: FrozenTrial, data: Data, metrics: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read."""
    parts = [
        _front_matter(session, trial),
        _summary(session, trial, data, metrics),
        *([_head_only(session)] if rung_of(trial) == "head" else []),
        _results(session, metrics),
        *_confirmed(session, metrics["verdict"]),
        _use(stored_recipe(trial), data),
        _limits(session, data, metrics["verdict"]),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(session: Session, trial: FrozenTrial) -> str:
    return "\n".join(
        [
            "---",
            "library_name: tuner",
            "pipeline_tag: image-classification",
            "tags:",
            "- imbalanced-data",
            "- long-tail",
            "---",
            "",
            f"# Trial {trial.number} of study {session.file.name}",
        ]
    )


def _summary(session: Session, trial: FrozenTrial, data: Data, metrics: dict[str, Any]) -> str:
    counts, attrs = data.class_counts, trial.user_attrs
    groups = ", ".join(f"{len(v)} {k}" for k, v in data.groups.named().items())
    return (
        f"{_standing(session, trial)}.{_breach(session, trial)} Loss `{attrs['loss']}`, sampler "
        f"`{attrs['sampler']}`, total correction κ = {attrs['kappa']:.2f}, post-hoc adjustment "
        f"τ = {attrs['tau']:.2f}. In training, {metrics['sampling']}.\n\n"
        f"Data: {data.name}, {data.num_classes} classes ({groups}), {int(counts.sum())} training "
        f"images, {int(counts.min())} to {int(counts.max())} per class, imbalance ratio "
        f"{imbalance_ratio(counts):.1f}. Fingerprint `{data.fingerprint[:16]}`."
    )


def _standing(session: Session, trial: FrozenTrial) -> str:
    """Which of how many trials it is: those of its rung, in a study with several."""
    best = session.best()
    first = "The best" if best is not None and best.number == trial.number else "One"
    ended = [t for t in session.trials() if t.state.is_finished()]
    own = sum(rung_of(t) == rung_of(trial) for t in ended)
    if own == len(ended):
        return f"{first} of {own} trials"
    return f"{first} of {own} trials of the {rung_of(trial)} rung ({len(ended)} of all rungs)"


def _breach(session: Session, trial: FrozenTrial) -> str:
    """That the search would not have taken it, had it found one that keeps the floor."""
    if session.keeps_floor(trial):
        return ""
    return f" In the search it broke the floor: {session.file.objective.floor}."


def _head_only(session: Session) -> str:
    """What a trial of the head rung is, and what training its recipe again is."""
    frozen = {
        "baseline": "frozen features of the plain cross-entropy network of this study",
        "initial": "frozen features of the model as it was given (its `weights_file`)",
    }[session.file.ladder.head.backbone]
    return (
        f"Only the classifier was trained with this recipe, on {frozen}. `model.safetensors` "
        "holds both, the backbone and the classifier, and the results below are theirs. "
        "`tuner train recipe.toml` trains the recipe from scratch, backbone and all: that is not "
        "the same training, and its numbers are others."
    )


def _results(session: Session, metrics: dict[str, Any]) -> str:
    verdict = metrics["verdict"]
    kind = "adjusted" if session.file.objective.adjusted else "raw"
    if verdict is None:
        row = {"metrics": metrics["validation"][kind], "intervals": metrics["intervals"][kind]}
        rows = [f"| {label} | {_with_interval(row, name)} |" for name, label in SHOWN.items()]
        title = "## Results on validation, with 95 % intervals"
        return "\n".join([title, "", "| accuracy | value |", "|---|---|", *rows])
    plain, best = verdict["rows"][:2]
    rows = [
        f"| {label} | {_with_interval(plain, name)} | {_with_interval(best, name)} |"
        for name, label in SHOWN.items()
    ]
    gap = (
        f"The search saw {_percent(verdict['validation_value'])} on validation and this is "
        f"{_percent(verdict['test_value'])} on the {verdict['part']} part; the first number was "
        "chosen for being high, the second was not."
    )
    return "\n".join(
        [
            f"## Results on the {verdict['part']} part, with 95 % intervals",
            "",
            "| accuracy | plain cross-entropy | this recipe |",
            "|---|---|---|",
            *rows,
            "",
            gap,
        ]
    )


def _confirmed(session: Session, verdict: dict[str, Any] | None) -> list[str]:
    """The same recipe with fresh seeds, if it was trained so; beside plain cross-entropy."""
    found = (verdict or {}).get("confirmed")
    if not found:
        return []
    metric, images = session.file.objective.metric, " and other validation images"
    name = f"adjusted {metric}" if found["adjusted"] else metric
    first, *others = found["recipes"]
    rows = [first, *(row for row in others if row["role"] != "recipe")]
    on_test = {each["trial"]: each["metrics"][metric] for each in found["test"]}
    lines = [
        f"| {ROLE_NAMES.get(row['role'], 'this recipe')} | "
        + " | ".join(
            spread(metric, values) + unit(metric) * bool(values)
            for values in ([row["search"]], row["values"], on_test.get(row["trial"], []))
        )
        + " |"
        for row in rows
    ]
    return [
        "\n".join(
            [
                f"## {name} with {found['seeds']} fresh seeds{images * found['other_images']}",
                "",
                "| recipe | in the search | validation, mean ± sd | test, mean ± sd |",
                "|---|---|---|---|",
                *lines,
                "",
                "Plain cross-entropy was tuned with {} of {} trials.".format(*found["tuned_with"]),
            ]
        )
    ]


def _use(recipe: Recipe, data: Data) -> str:
    steps, size = recipe.steps(len(data.train)), recipe.training.batch_size
    return f"""## Use

Train the recipe with `tuner train recipe.toml`: {recipe.epochs} epochs of {steps // recipe.epochs}
optimizer steps, {steps} in all, with {size} images each. In your own PyTorch code:

```python
recipe = tuner.load_recipe("recipe.toml")
loss = recipe.loss(class_counts)                      # nn.Module (logits, targets)
loader = DataLoader(dataset, sampler=recipe.sampler(targets))
predictions = recipe.adjust(model(images)).argmax(1)
```

Images are {"x".join(map(str, data.image_shape))} (channels, height, width), scaled to 0..1 and
normalised with mean {_numbers(data.mean)} and standard deviation {_numbers(data.std)}. The
classes, in the order of the logits, stand in `recipe.toml` under `[result]`."""


def _limits(session: Session, data: Data, verdict: dict[str, Any] | None) -> str:
    once = "One training with one seed: how much another seed changes was not measured."
    lines = [
        *([] if (verdict or {}).get("confirmed") else [once]),
        *data.warnings,
        *certainty(data),
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _with_interval(row: dict[str, Any], name: str) -> str:
    interval = row["intervals"].get(name)
    value = _percent(row["metrics"][name])
    return (
        value if interval is None else f"{value} ({_percent(interval[0])}–{_percent(interval[1])})"
    )


def _percent(value: float | None) -> str:
    return "not estimable" if value is None else f"{100 * value:.1f} %"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
