"""Pruning: only what noise does not explain, only after the schedule has settled."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tuner.imbalance import Groups
from tuner.pruning import Curve, Curves, effective_images, is_at_chance, is_behind

EPOCHS = 20


def curve(level: float, *, epochs: int = EPOCHS, loss: str = "focal", length: int = 20) -> Curve:
    return Curve(loss, (level,) * length, epochs, settled=0.1, complete=length == epochs)


PEERS = [curve(level) for level in (0.7, 0.72, 0.75, 0.8, 0.82)]


def behind(candidate: Curve, peers: list[Curve] = PEERS, images: int = 100) -> bool:
    return is_behind(candidate, Curves(peers), images=images, after=0.5)


def test_trial_far_below_its_peers_is_behind() -> None:
    assert behind(curve(0.3, length=12))


def test_trial_within_the_noise_of_its_peers_goes_on() -> None:
    assert not behind(curve(0.68, length=12))


def test_the_same_gap_is_noise_on_few_images() -> None:
    assert behind(curve(0.5, length=12), images=100)
    assert not behind(curve(0.5, length=12), images=8)


def test_nothing_is_behind_before_the_given_share_of_training() -> None:
    assert not behind(curve(0.1, length=10))
    assert behind(curve(0.1, length=11))


def test_nothing_is_behind_while_its_deferred_part_has_not_settled() -> None:
    late = replace(curve(0.1, length=17), settled=0.8)
    settled = [replace(peer, settled=0.1) for peer in PEERS]
    assert not behind(late, settled)
    assert behind(replace(late, values=(0.1,) * 18), settled)


def test_a_peer_counts_only_where_its_own_deferred_part_has_settled() -> None:
    unsettled = [replace(peer, settled=0.8) for peer in PEERS]
    assert not behind(curve(0.1, length=12), unsettled)


def test_one_bad_epoch_is_forgiven() -> None:
    stumbled = Curve("focal", (0.75,) * 11 + (0.1,), EPOCHS, settled=0.1, complete=False)
    assert not behind(stumbled)


def test_two_trials_of_every_loss_are_kept() -> None:
    others = [replace(peer, loss="ldam") for peer in PEERS]
    assert not behind(curve(0.1, length=12), others)
    assert not behind(curve(0.1, length=12), [*others, curve(0.2)])
    assert behind(curve(0.1, length=12), [*others, curve(0.2), curve(0.25)])


def test_too_few_peers_decide_nothing() -> None:
    assert not behind(curve(0.1, length=12), PEERS[:3])


def test_peers_that_end_one_by_one_stand_in_order_at_every_share() -> None:
    chance = random.Random(0)
    peers, found = [], Curves()
    for length in (*range(1, EPOCHS + 1), EPOCHS, EPOCHS):
        values = tuple(chance.random() for _ in range(length))
        peers.append(Curve("focal", values, EPOCHS, settled=0.1, complete=length == EPOCHS))
        found.add(peers[-1])
        for epoch in range(1, EPOCHS + 1):
            there = [v for p in peers if (v := p.at(epoch / EPOCHS)) is not None]
            assert found.at(epoch / EPOCHS) == sorted(there)
    assert found.complete("focal") == 3
    assert found.complete("ldam") == 0


def test_value_that_could_not_be_estimated_is_no_peers() -> None:
    nothing = curve(float("nan"))
    assert behind(curve(0.3, length=12), [*PEERS, nothing])
    assert len(Curves([nothing, *PEERS]).at(0.6)) == len(PEERS)


def test_trials_of_other_lengths_are_compared_at_equal_fraction() -> None:
    long = [
        Curve("focal", tuple([0.2] * 30 + [0.9] * 30), 60, settled=0.1, complete=True)
        for _ in range(5)
    ]
    assert not behind(curve(0.22, length=10), long)
    assert behind(curve(0.22, length=12), long)


def test_branch_is_compared_at_its_own_epochs_and_has_no_value_before_them() -> None:
    branch = Curve("focal", (0.1, 0.2, 0.3, 0.4), EPOCHS, settled=0.1, complete=True, first=16)
    found = [branch.at(epoch / EPOCHS) for epoch in (16, 17, 20)]
    assert found == [None, 0.1, 0.4]
    assert branch.length == EPOCHS
    assert behind(branch)
    assert not behind(curve(0.1, length=12), [branch] * 5), "it says nothing about epoch 12"


def test_branch_is_judged_by_two_epochs_of_its_own() -> None:
    branch = Curve("focal", (0.1,), EPOCHS, settled=0.1, complete=False, first=16)
    assert not behind(branch)
    assert behind(replace(branch, values=(0.1, 0.1)))


@pytest.mark.parametrize(("accuracy", "guesses"), [(0.1, True), (0.105, True), (0.2, False)])
def test_predicting_one_class_is_chance(accuracy: float, guesses: bool) -> None:
    assert is_at_chance(accuracy, 10, images=100, progress=0.5) is guesses
    assert not is_at_chance(accuracy, 10, images=100, progress=0.2)


def test_few_images_of_one_class_count_for_little_in_a_mean_of_recalls() -> None:
    groups = Groups(head=(0,), medium=(), tail=(1, 2))
    images = torch.tensor([100, 50, 2])
    assert effective_images("tail_accuracy", images, groups) == pytest.approx(4 / (1 / 50 + 1 / 2))
    assert effective_images("head_accuracy", images, groups) == pytest.approx(100)
    assert effective_images("accuracy", images, groups) == pytest.approx(152)


@pytest.mark.parametrize("metric", ["worst_class", "geometric_mean", "nll", "medium_accuracy"])
def test_metric_without_a_bound_is_not_pruned_by(metric: str) -> None:
    groups = Groups(head=(0,), medium=(), tail=(1, 2))
    assert effective_images(metric, torch.tensor([100, 50, 2]), groups) is None
