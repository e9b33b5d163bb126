from __future__ import annotations

import pytest
import torch
from head_cases import CASES, loss_table, unlike
from torch import Tensor

from tuner.losses import LOSSES, CrossEntropyLoss, FocalLoss, Loss
from tuner.rows import GRADIENTS, Batch, Table, row_of

COUNTS = torch.tensor([2000, 300, 40, 10, 5])
LANES, CLASSES, SAMPLES = 3, len(COUNTS), 96
BY_MODULE = {"fnr_adaptive reference"}

every_case = pytest.mark.parametrize("case", CASES)
before_and_after = pytest.mark.parametrize("progress", [0.0, 0.75])


def built(case: str, progress: float) -> list[Loss]:
    tables = [loss_table(case, seed) for seed in range(LANES)]
    components = [LOSSES.parse(t.pop("name"), t, where="test") for t in tables]
    losses = [component.build(COUNTS) for component in components]
    for loss in losses:
        loss.advance(progress)
    return losses


def sample(dtype: torch.dtype, *, cosine: bool) -> tuple[Tensor, Tensor]:
    """Logits (K, C, B), some of them of samples that are all but certain, and targets (B,)."""
    draws = torch.Generator().manual_seed(3)
    logits = torch.randn(LANES, CLASSES, SAMPLES, generator=draws, dtype=torch.float64)
    spread = torch.ones(SAMPLES) if cosine else torch.tensor([0.1, 1.0, 4.0, 12.0]).repeat(24)
    logits = logits.clamp(-1, 1) if cosine else logits * spread
    return logits.to(dtype), torch.randint(CLASSES, (SAMPLES,), generator=draws)


def closed_form(losses: list[Loss], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (K, C, B) of the mean losses for the logits, and the mean losses (K,)."""
    rows = [row_of(loss) for loss in losses]
    table = Table(LANES, CLASSES, logits.dtype)
    for lane, row in enumerate(rows):
        assert row is not None
        table.admit(lane)
        table.set(lane, row)
    table.note()
    hit = torch.nn.functional.one_hot(targets, CLASSES).t().to(logits.dtype)[None]
    weight = torch.full((LANES, 1, SAMPLES), 1 / SAMPLES, dtype=logits.dtype)
    sizes = torch.tensor([[SAMPLES]])
    batch = Batch(targets, hit, weight, sizes, torch.zeros(1).long(), table.decay(sizes)[0])
    mult, add = table["mult"][:, :, None], table["add"][:, :, None]
    kinds = {row.kind for row in rows if row is not None}
    found, values = GRADIENTS[kinds.pop()](logits * mult + add, batch, table, True)
    assert not kinds
    assert values is not None
    return found * mult, values.sum((1, 2))


def by_autograd(losses: list[Loss], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    gradients, values = [], []
    for loss, own in zip(losses, logits, strict=True):
        leaf = own.t().contiguous().requires_grad_()
        value = loss(leaf, targets)
        gradients.append(torch.autograd.grad(value, leaf)[0].t())
        values.append(value.detach())
    return torch.stack(gradients), torch.stack(values)


@every_case
@before_and_after
def test_closed_form_is_the_gradient_of_the_registered_loss(case: str, progress: float) -> None:
    losses = built(case, progress)
    if case in BY_MODULE:
        assert row_of(losses[0]) is None
        return
    logits, targets = sample(torch.float64, cosine=case == "ldam")
    gradient, values = closed_form(losses, logits, targets)
    expected, expected_values = by_autograd(losses, logits, targets)
    for lane in range(LANES):
        assert unlike(gradient[lane], expected[lane]) < 1e-10
    assert unlike(values, expected_values) < 1e-10


@every_case
@before_and_after
def test_closed_form_in_float32_is_as_near_to_the_truth_as_autograd(
    case: str, progress: float
) -> None:
    if case in BY_MODULE:
        return
    logits, targets = sample(torch.float32, cosine=case == "ldam")
    gradient, _ = closed_form(built(case, progress), logits, targets)
    usual, _ = by_autograd(built(case, progress), logits, targets)
    truth, _ = by_autograd(built(case, progress), logits.double(), targets)
    for lane in range(LANES):
        assert unlike(gradient[lane], truth[lane]) < 1e-6 + 2 * unlike(usual[lane], truth[lane])


@every_case
def test_every_loss_but_few_has_a_row(case: str) -> None:
    """A new loss is computed by its own module, and is to be entered here."""
    assert (row_of(built(case, 0.0)[0]) is None) == (case in BY_MODULE)


def test_a_loss_derived_from_one_with_a_row_has_none() -> None:
    class Doubled(CrossEntropyLoss):
        def table(self, logits: Tensor) -> Tensor:
            return 2 * super().table(logits)

    assert row_of(Doubled(COUNTS)) is None


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropyLoss(COUNTS, label_smoothing=0.1, class_weights=torch.ones(CLASSES)),
        CrossEntropyLoss(COUNTS, reduction="sum"),
        FocalLoss(COUNTS, label_smoothing=0.1),
    ],
    ids=["weighted and smoothed", "summed", "focal and smoothed"],
)
def test_options_that_rows_cannot_say_leave_the_loss_to_its_module(loss: Loss) -> None:
    assert row_of(loss) is None


def test_gradient_of_a_lane_is_the_same_whatever_its_neighbours_use() -> None:
    """What no lane uses is left out; that must not change a bit."""
    logits, targets = sample(torch.float32, cosine=False)
    plain: list[Loss] = [CrossEntropyLoss(COUNTS) for _ in range(LANES)]
    mixed: list[Loss] = [plain[0], FocalLoss(COUNTS, gamma=1.5), built("ldam", 0.75)[0]]
    alone, _ = closed_form(plain, logits, targets)
    beside, _ = closed_form(mixed, logits, targets)
    assert torch.equal(alone[0], beside[0])
