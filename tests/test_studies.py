"""The shipped study files: they load, they run, and they ask what they say they ask."""

from __future__ import annotations

import pickle
import struct
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest
import tomli_w
import torch
from image_folders import photos
from optuna.trial import FixedTrial

from tuner import backends
from tuner import session as sessions
from tuner.recipe import Recipe
from tuner.rungs.outcome import Outcome
from tuner.stores import FolderStore
from tuner.study import StudyFile, load, parse
from tuner.worker import work

FOLDER = Path(__file__).parents[1] / "studies"
FILES = sorted(FOLDER.glob("*.toml"))

HEADS = 3
every_study = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def shipped(name: str) -> StudyFile:
    return load(FOLDER / f"{name}.toml")


def write_photos(root: Path) -> None:
    photos(root / "photos", {"cat": 16, "dog": 12, "emu": 10, "yak": 8})


def write_mnist(root: Path) -> None:
    raw, rng = root / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    targets = np.repeat(np.arange(10, dtype=np.uint8), 30)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (len(targets), 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, len(targets), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, len(targets))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + targets.tobytes())


def write_cifar(root: Path, classes: int, per_class: int) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    cifar = {10: CIFAR10, 100: CIFAR100}[classes]
    key = {10: "labels", 100: "fine_labels"}[classes]
    folder, rng = root / cifar.base_folder, np.random.default_rng(0)
    folder.mkdir()
    files = [name for name, _ in (*cifar.train_list, *cifar.test_list)]
    targets = list(range(classes)) * (per_class // (len(files) - 1))
    for name in files:
        pixels = rng.integers(0, 256, (len(targets), 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: targets}))
    names = [f"class {c}" for c in range(classes)]
    meta = {cifar.meta["key"]: names}
    (folder / cifar.meta["filename"]).write_bytes(pickle.dumps(meta))


WRITERS: dict[str, Callable[[Path], None]] = {
    "digits": lambda _: None,
    "mnist": write_mnist,
    "cifar10": lambda root: write_cifar(root, 10, 10),
    "cifar100": lambda root: write_cifar(root, 100, 3),
    "image_folder": write_photos,
}
"""Tiny data in the format of each data set."""


@pytest.fixture
def _own_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read CIFAR files that are not the published ones."""
    from torchvision.datasets import CIFAR10, CIFAR100

    for cifar in (CIFAR10, CIFAR100):
        monkeypatch.setattr(cifar, "_check_integrity", lambda self: True)
        monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": None})


def shortened(path: Path) -> StudyFile:
    """The study with one epoch, small images and a tail that few images can have."""
    values = tomllib.loads(path.read_text())
    values["budget"]["epochs"] = 1
    if "ladder" in values:
        values["ladder"]["head"] = {"trials": HEADS, "epochs": 1}
    if values["data"].get("profile", {}).get("name") in ("exponential", "step"):
        values["data"]["profile"] = {"name": "exponential", "ratio": 3, "order": "size"}
    if "image_size" in values["data"]:
        values["data"]["image_size"] = 16
    return parse(values, tomli_w.dumps(values), where=path.name)


@pytest.mark.long
@every_study
@pytest.mark.usefixtures("_own_cifar")
def test_study_trains_its_first_trials(
    path: Path, tmp_path: Path, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "features"))
    # What the speed probe would find on whole batches is of no interest here.
    for name, value in {"PIXELS": 0, "SMALLEST": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(backends, name, value)
    file = shortened(path)
    WRITERS[tomllib.loads(path.read_text())["data"]["name"]](tmp_path)
    data = file.data.build(tmp_path)
    session = sessions.create(file, sqlite, FolderStore(tmp_path / "artifacts"), data)
    outcomes: list[Outcome] = []

    def trained() -> int:
        return sum(outcome.state == "complete" for outcome in outcomes)

    work(session, data, stop=lambda: trained() == 2, on_trial=outcomes.append)
    heads = [outcome for outcome in outcomes if outcome.reason == "head"]
    assert len(heads) == (HEADS if "head" in file.ladder.rungs else 0)
    outcomes = [outcome for outcome in outcomes if outcome not in heads]
    assert {outcome.state for outcome in outcomes} <= {"complete", "duplicate"}
    assert (outcomes[0].state, len(outcomes)) in {("complete", 2), ("complete", 3)}


@every_study
def test_every_recipe_a_study_may_propose_is_valid(path: Path) -> None:
    space = load(path).space
    for part, branches in space.parts.items():
        for name in branches:
            recipe = space.suggest(FixedTrial(space.defaults(**{part: name})))
            assert recipe.to_dict()[part]["name"] == name
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        recipe = space.suggest(study.ask())
        assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@every_study
def test_study_is_named_like_its_file_and_opens_with_a_question(path: Path) -> None:
    head, _, rest = path.read_text().partition("\nname = ")
    assert load(path).name == path.stem
    assert rest
    assert all(line.startswith("# ") for line in head.splitlines())
    assert "?" in head


def test_every_study_has_its_line_in_the_overview() -> None:
    lines = (FOLDER / "README.md").read_text().splitlines()
    for path in FILES:
        assert sum(f"[`{path.name}`]({path.name})" in line for line in lines) == 1


def test_class_balanced_grid_has_the_twenty_recipes_of_the_paper() -> None:
    file = shipped("class-balanced-grid")
    recipes = [file.space.suggest(FixedTrial(params)) for params in file.grid]
    tried = Counter(
        (loss.beta, loss.base, loss.gamma if loss.base == "focal" else None)
        for loss in (recipe.loss for recipe in recipes)
    )
    kinds = [("softmax", None), ("sigmoid", None), *(("focal", g) for g in (0.5, 1.0, 2.0))]
    assert tried == Counter((b, *k) for b in (0.9, 0.99, 0.999, 0.9999) for k in kinds)
    assert len({recipe.digest() for recipe in recipes}) == len(recipes) == 20
    assert file.trials() == 21, "and plain cross-entropy"


def test_class_balanced_grid_trains_as_the_paper_does() -> None:
    file = shipped("class-balanced-grid")
    recipe = file.space.suggest(FixedTrial(file.grid[-1]))
    factors = [recipe.schedule.factor(epoch, recipe.epochs) for epoch in (0, 2.5, 5, 159, 160, 180)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.01, 0.0001])
    assert (recipe.epochs, recipe.training.batch_size) == (200, 128)
    sgd = recipe.optimizer
    assert (sgd.lr, sgd.momentum, sgd.weight_decay, sgd.nesterov) == (0.1, 0.9, 2e-4, False)
    assert recipe.loss.normalization == "classes"
    assert not file.objective.adjusted
    assert file.search.pruner == "none"


def test_ladder_study_climbs_the_space_of_the_plain_one_with_fewer_trainings() -> None:
    ladder, plain = shipped("cifar10-ladder"), shipped("cifar10-lt100")
    assert (ladder.space, ladder.objective, ladder.search) == (
        plain.space,
        plain.objective,
        plain.search,
    )
    assert ladder.ladder.rungs == ("head", "full", "confirm")
    in_full = ladder.trials() + ladder.ladder.trials("confirm", ladder.trials())
    assert (in_full, plain.trials()) == (63, 80)


@pytest.mark.parametrize(
    ("name", "classes", "full", "total", "smallest"),
    [("cifar10-lt100", 10, 5000, 12406, 50), ("cifar100-lt100", 100, 500, 10847, 5)],
)
def test_cifar_studies_have_the_long_tail_of_the_literature(
    name: str, classes: int, full: int, total: int, smallest: int
) -> None:
    counts = shipped(name).data.profile.carve(torch.full((classes,), full))
    assert (counts.sum(), counts[0], counts[-1]) == (total, full, smallest)


def test_cifar100_study_groups_classes_as_the_literature_does() -> None:
    data = shipped("cifar100-lt100").data
    groups = data.tail.groups(data.profile.carve(torch.full((100,), 500)), [""] * 100)
    assert [len(classes) for classes in groups.named().values()] == [35, 35, 30]


def test_mnist_study_keeps_nine_tenths_of_the_zeros_and_a_tenth_of_the_rest() -> None:
    data = shipped("mnist-9to1").data
    counts = data.profile.carve(torch.full((10,), 6000))
    assert counts.tolist() == [5400, *[600] * 9]
    groups = data.tail.groups(counts, [str(c) for c in range(10)])
    assert groups.tail == tuple(range(1, 10))


def test_two_hundred_classes_climb_the_ladder_until_the_tail_reaches_60_percent() -> None:
    file = shipped("two-hundred-classes")
    counts = file.data.profile.carve(torch.full((200,), 600))
    assert counts[:150].tolist() == [500] * 150
    assert (counts[150], counts[-1]) == (50, 10)
    groups = file.data.tail.groups(counts, [str(c) for c in range(200)])
    assert groups.tail == tuple(range(150, 200))
    assert (file.search.strategy, file.search.gate) == ("progressive", 0.6)


def test_loss_search_covers_what_was_asked_for() -> None:
    space = shipped("loss-search").space
    assert dict(space.rows())["sampler.class_aware.tail_factor"] == "1 to 5"
    losses = space.parts["loss"]
    assert {"gamma_neg", "eps"} <= set(losses["asymmetric"])
    assert {"gamma_neg", "eps", "power"} <= set(losses["weighted_asymmetric"])
    for loss in ("weighted_cross_entropy", "weighted_asymmetric"):
        assert space.defaults(loss=loss)[f"loss.{loss}.power"] == 0.5, "square-root dampening"
    name = "loss.class_balanced.effective_samples"
    defaults = space.defaults(loss="class_balanced")
    for samples, beta in ((10, 0.9), (10_000, 0.9999)):
        recipe = space.suggest(FixedTrial(defaults | {name: samples}))
        assert recipe.loss.resolved_beta == pytest.approx(beta)
