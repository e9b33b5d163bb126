"""Losses of one's own in a seat: what they do to their tensors there is what they do alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from replayed import Replaying
from torch import Tensor
from trainer_cases import recipe, trained

from tuner.datasets import Data
from tuner.lane import Lane
from tuner.losses import CrossEntropyLoss, FocalLoss
from tuner.trainer import epochs

EXACT = partial(Lane, dtype=torch.float64)
MIXED = {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4}


class Scaled(CrossEntropyLoss):
    """Its margins follow the progress of the training: a new tensor each time."""

    margins: Tensor

    def __init__(self, class_counts: Tensor) -> None:
        super().__init__(class_counts)
        self.register_buffer("margins", torch.zeros_like(self.class_counts), persistent=False)

    def advance(self, progress: float) -> None:
        super().advance(progress)
        self.margins = progress * self.class_counts / self.class_counts.max()

    def table(self, logits: Tensor) -> Tensor:
        return super().table(logits + self.margins.to(logits))


class Kept(Scaled):
    """The same margins, with a state that checkpoints have."""

    def __init__(self, class_counts: Tensor) -> None:
        super().__init__(class_counts)
        self.register_buffer("margins", torch.zeros_like(self.class_counts))


class Bare(Scaled):
    """The same margins, in an attribute that is no buffer."""

    def __init__(self, class_counts: Tensor) -> None:
        super().__init__(class_counts)
        del self.margins
        self.margins = torch.zeros_like(class_counts)


class Written(Scaled):
    """The same margins, written in place."""

    def advance(self, progress: float) -> None:
        margins = self.margins
        super().advance(progress)
        self.margins = margins.copy_(self.margins)


class Nested(CrossEntropyLoss):
    """The loss is another one, which it hands the progress to."""

    def __init__(self, class_counts: Tensor) -> None:
        super().__init__(class_counts)
        self.inner = Scaled(class_counts)
        self.late = FocalLoss(class_counts, gamma=2.0, start=0.5)

    def advance(self, progress: float) -> None:
        self.inner.advance(progress)
        self.late.advance(progress)

    def table(self, logits: Tensor) -> Tensor:
        focal = self.late.table(logits) if self.late.active else 0.0
        return self.inner.table(logits) + focal


class Growing(CrossEntropyLoss):
    """It has one tensor more from some epoch on."""

    extra: Tensor | None = None

    def advance(self, progress: float) -> None:
        if progress > 0:
            self.extra = progress * self.class_counts / self.class_counts.sum()

    def table(self, logits: Tensor) -> Tensor:
        extra = 0.0 if self.extra is None else self.extra.to(logits)
        return super().table(logits + extra)


class Sharing(Scaled):
    """Its margins are a row of a table, another one from epoch to epoch."""

    rows: Tensor

    def __init__(self, class_counts: Tensor) -> None:
        super().__init__(class_counts)
        draws = torch.Generator().manual_seed(0)
        self.register_buffer("rows", torch.rand(8, len(class_counts), generator=draws))

    def advance(self, progress: float) -> None:
        self.margins = self.rows[int(8 * progress)]


class Replacing(CrossEntropyLoss):
    """It remembers its last batch in a new tensor each time."""

    last: Tensor

    def __init__(self, class_counts: Tensor) -> None:
        super().__init__(class_counts)
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = super().forward(logits, targets)
        found = loss + 0.1 * self.last.to(loss) * loss
        self.last = loss.detach().double()
        return found


RECORDED = [Scaled, Kept, Bare, Written, Nested]
SINGLE = [Growing, Sharing, Replacing]


@pytest.mark.parametrize("loss", [*RECORDED, *SINGLE])
def test_loss_that_changes_its_tensors_trains_in_a_seat_as_it_trains_alone(
    loss: type[CrossEntropyLoss], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.trainer.Lane", EXACT)
    replaying = Replaying.by(monkeypatch)
    which = recipe(augment=MIXED)
    monkeypatch.setattr(type(which.loss), "build", lambda _, counts: loss(counts))
    plainly = trained(which, digits, execution="plain")
    plainly.ends_near(list(epochs(which, digits, execution="graph")), 1e-9)
    (steps,) = replaying.made
    assert steps.recordable == (loss in RECORDED)


@pytest.mark.parametrize("loss", RECORDED)
def test_training_that_follows_in_the_seat_begins_with_tensors_of_its_own(
    loss: type[CrossEntropyLoss], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying = Replaying.by(monkeypatch)
    which = recipe()
    monkeypatch.setattr(type(which.loss), "build", lambda _, counts: loss(counts))
    first = trained(which, digits, execution="graph")
    assert first.ends_as(list(epochs(which, digits, execution="graph")))
    assert len(replaying.made) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [*RECORDED, *SINGLE])
def test_loss_that_changes_its_tensors_trains_in_a_graph_as_it_trains_alone(
    loss: type[CrossEntropyLoss], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_device = digits.to("cuda")
    monkeypatch.setattr("tuner.trainer.Lane", EXACT)
    which = recipe(augment=MIXED)
    monkeypatch.setattr(type(which.loss), "build", lambda _, counts: loss(counts))
    plainly = trained(which, on_device, device="cuda", execution="plain")
    results = list(epochs(which, on_device, device="cuda", execution="graph"))
    plainly.ends_near(results, 1e-9)
