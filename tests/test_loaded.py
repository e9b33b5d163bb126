"""An exported recipe in somebody else's training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tuner
from tuner.errors import DataError, StudyFileError
from tuner.loaded import LoadedRecipe, load_recipe
from tuner.samplers import ClassAware

COUNTS = [200, 60, 20]
HEAD = """
epochs = 12
seed = 5
[data]
name = "digits"
tail = { bottom = 0.3 }
[model]
name = "linear"
"""
LOSS = '[loss]\nname = "weighted_cross_entropy"\npower = 0.5\n'
SAMPLER = '[sampler]\nname = "class_aware"\nexponent = 0.5\n'
RESULT = """
[result]
tau = 0.5
class_counts = [200, 60, 20]
class_names = ["cat", "dog", "lynx"]
[provenance]
study = "pets"
trial = 7
fingerprint = "0123"
"""


def written(folder: Path, text: str) -> LoadedRecipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def blobs() -> tuple[Tensor, Tensor]:
    """Three overlapping clouds of points (N, 2) with a long tail, and their classes (N,)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    targets = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    return centres[targets] + torch.randn(len(targets), 2, generator=generator), targets


def trained(recipe: LoadedRecipe, points: Tensor, targets: Tensor, epochs: int = 12) -> nn.Module:
    """A linear model from a plain PyTorch loop that takes loss and sampler from a recipe."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loss = recipe.loss(torch.bincount(targets))
    dataset = TensorDataset(points, targets)
    loader = DataLoader(dataset, batch_size=16, sampler=recipe.sampler(targets))
    for epoch in range(epochs):
        loss.advance(epoch / epochs)
        for batch, classes in loader:
            optimizer.zero_grad()
            loss(model(batch), classes).backward()
            optimizer.step()
    return model


def recalls(logits: Tensor, targets: Tensor) -> Tensor:
    hits = (logits.argmax(1) == targets).double()
    return torch.stack([hits[targets == c].mean() for c in range(3)])


def test_recipe_file_holds_what_was_found_and_where(tmp_path: Path) -> None:
    recipe = written(tmp_path, HEAD + LOSS + RESULT)
    assert (recipe.recipe.epochs, recipe.recipe.seed, recipe.tau) == (12, 5, 0.5)
    assert recipe.class_counts.tolist() == COUNTS
    assert recipe.class_names == ("cat", "dog", "lynx")
    assert recipe.provenance == {"study": "pets", "trial": 7, "fingerprint": "0123"}


def test_recipe_written_by_hand_needs_no_result(tmp_path: Path) -> None:
    recipe = written(tmp_path, HEAD)
    assert recipe.tau == 0
    assert recipe.provenance == {}
    logits = torch.randn(4, 3)
    assert torch.equal(recipe.adjust(logits), logits)


def test_package_offers_load_recipe_by_text_and_by_path(tmp_path: Path) -> None:
    written(tmp_path, HEAD + RESULT)
    path = tmp_path / "recipe.toml"
    assert tuner.load_recipe(str(path)).recipe == tuner.load_recipe(path).recipe


def test_recipe_trains_a_foreign_model_and_serves_the_tail(tmp_path: Path) -> None:
    points, targets = blobs()
    plain = trained(written(tmp_path, HEAD), points, targets)
    recipe = written(tmp_path, HEAD + LOSS + SAMPLER + RESULT)
    model = trained(recipe, points, targets)
    with torch.no_grad():
        before = recalls(plain(points), targets)
        raw = recalls(model(points), targets)
        adjusted = recalls(recipe.adjust(model(points)), targets)
    assert raw.mean() > 0.7
    assert before[2] + 0.1 < raw[2] <= adjusted[2]


def test_sampler_draws_the_tail_as_often_as_the_recipe_says(tmp_path: Path) -> None:
    _, targets = blobs()
    sampler = written(tmp_path, HEAD + '[sampler]\nname = "class_aware"\n').sampler(targets)
    drawn = targets[torch.tensor(list(sampler))].bincount()
    assert len(sampler) == len(targets)
    assert int(drawn.max() - drawn.min()) < 30


def test_ranks_share_an_epoch(tmp_path: Path) -> None:
    _, targets = blobs()
    recipe = written(tmp_path, HEAD)
    ranks = [list(recipe.sampler(targets, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(len(targets)))


def test_two_recipes_of_one_file_draw_alike(tmp_path: Path) -> None:
    _, targets = blobs()
    first, second = (written(tmp_path, HEAD + SAMPLER).sampler(targets) for _ in range(2))
    assert list(first) == list(second)
    assert list(first) == list(second)


def test_counts_and_targets_may_be_lists(tmp_path: Path) -> None:
    recipe = written(tmp_path, HEAD + LOSS + RESULT)
    loss = recipe.loss(COUNTS)
    assert loss(torch.zeros(2, 3), torch.tensor([0, 2])) > 0
    assert len(list(recipe.sampler([0, 0, 1, 2]))) == 4
    logits = torch.randn(2, 3)
    assert torch.equal(recipe.adjust(logits, COUNTS), recipe.adjust(logits))


def test_adjustment_takes_the_log_priors_off(tmp_path: Path) -> None:
    recipe = written(tmp_path, HEAD + RESULT)
    logits = torch.randn(5, 3)
    priors = torch.tensor(COUNTS) / sum(COUNTS)
    torch.testing.assert_close(recipe.adjust(logits), logits - 0.5 * priors.log())
    assert recipe.adjust(logits.half()).dtype == torch.float16


def test_recipe_serves_data_of_another_number_of_classes(tmp_path: Path) -> None:
    tail_first = 'tail_factor = 5.0\nexponent = 0.0\n[loss]\nname = "balanced_softmax"\n'
    recipe = written(tmp_path, HEAD + '[sampler]\nname = "class_aware"\n' + tail_first + RESULT)
    for counts in ([60, 5], [400, 300, 200, 100, 50, 10]):
        targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        drawn = targets[torch.tensor(list(recipe.sampler(targets)))].bincount()
        assert drawn[-1] > 2 * counts[-1]
        assert recipe.loss(counts)(torch.zeros(1, len(counts)), torch.tensor([1])) > 0
        assert recipe.adjust(torch.zeros(1, len(counts)), counts).argmax() == len(counts) - 1


def test_adjustment_with_counts_of_other_classes_says_so(tmp_path: Path) -> None:
    recipe = written(tmp_path, HEAD + RESULT)
    with pytest.raises(DataError, match="logits are of 4 classes, the recipe's class_counts of 3"):
        recipe.adjust(torch.zeros(2, 4))
    with pytest.raises(DataError, match="logits are of 4 classes, your class_counts of 2"):
        recipe.adjust(torch.zeros(2, 4), [3, 1])
    without = written(tmp_path, HEAD + "[result]\ntau = 1.0\n")
    with pytest.raises(DataError, match="give the counts of your training data"):
        without.adjust(torch.zeros(2, 4))


def test_deferred_weights_act_from_their_start(tmp_path: Path) -> None:
    recipe = written(tmp_path, HEAD + LOSS + "start = 0.8\n")
    loss = recipe.loss(COUNTS)
    logits, targets = torch.zeros(3, 3), torch.tensor([0, 1, 2])
    loss.advance(0.79)
    even = loss.per_sample(logits, targets)
    loss.advance(0.8)
    weighted = loss.per_sample(logits, targets)
    torch.testing.assert_close(even, torch.full((3,), 3.0).log())
    assert weighted[0] < weighted[1] < weighted[2]


def test_two_stage_recipe_gives_the_sampler_of_its_second_stage(tmp_path: Path) -> None:
    recipe = written(tmp_path, HEAD + '[training]\nname = "two_stage"\n')
    _, targets = blobs()
    sampler = recipe.sampler(targets)
    assert sampler.component == ClassAware(exponent=1.0)
    drawn = targets[torch.tensor(list(sampler))].bincount()
    assert int(drawn.max() - drawn.min()) < 30


def test_deferred_sampler_waits_for_its_start_when_told_the_progress(tmp_path: Path) -> None:
    _, targets = blobs()
    recipe = written(tmp_path, HEAD + '[sampler]\nname = "class_aware"\nstart = 0.6\n')
    sampler = recipe.sampler(targets)
    shares = []
    for progress in (0.0, 0.59, 0.6, 0.9):
        sampler.set_progress(progress)
        shares.append(int((targets[torch.tensor(list(sampler))] == 2).sum()))
    assert shares[:2] == [20, 20]
    assert min(shares[2:]) > 60


def test_curriculum_recipe_starts_balanced_and_ends_naturally(tmp_path: Path) -> None:
    _, targets = blobs()
    sampler = written(tmp_path, HEAD + '[sampler]\nname = "curriculum"\n').sampler(targets)
    sampler.set_progress(0.0)
    early = targets[torch.tensor(list(sampler))].bincount()
    sampler.set_progress(0.9)
    late = targets[torch.tensor(list(sampler))].bincount()
    assert int(early.max() - early.min()) < 30
    assert late.tolist() == COUNTS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[result]\ntaw = 1.0\n", "result.taw: unknown key; did you mean 'tau'?"),
        ('[result]\ntau = "1"\n', 'result.tau = "1": must be a number'),
        ("[result]\ntau = nan\n", "result.tau = nan: must be a finite number"),
        ("[result]\nclass_counts = [3, -1]\n", "result.class_counts[1] = -1: must be at least 0"),
        (
            '[result]\nclass_counts = [3, 1]\nclass_names = ["a"]\n',
            "result: class_counts has 2 classes, class_names 1",
        ),
        ("[results]\ntau = 1.0\n", "unknown key 'results'"),
        ("[loss]\nname = 'fokal'\n", "loss: unknown loss 'fokal'; did you mean 'focal'?"),
        ("[space.loss.focal]\n", "unknown key 'space'"),
    ],
)
def test_wrong_recipe_file_says_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        written(tmp_path, HEAD + text)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.toml'}: ")
    assert said in str(caught.value)


def test_provenance_and_result_must_be_tables(tmp_path: Path) -> None:
    for key in ("provenance", "result"):
        with pytest.raises(StudyFileError, match=f"{key} = 3: must be a table"):
            written(tmp_path, f"{key} = 3\n" + HEAD)
