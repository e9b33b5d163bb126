"""Steps one after another, launched operation by operation: any device, model and data."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from tuner.lane import Lane
from tuner.seeding import random_state, repeatable, seeded, set_random_state


class PlainSteps:
    """Executes each step when its turn comes; see ``Steps``."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.total = torch.zeros((), dtype=torch.float64, device=lane.device)

    def run(
        self, batches: Sequence[Tensor], done: int, random: Mapping[str, Tensor] | None
    ) -> Generator[int | None, None, None]:
        """See ``Steps``; it never waits, and whoever asks for a stop may do so at every step."""
        lane = self.lane
        # Dropout draws from the global generator; a seed per epoch keeps training resumable.
        # Closing ends the processes that load images, also while an exception is alive.
        with (
            seeded(lane.recipe.seed, "epoch", lane.epoch, device=lane.device),
            repeatable(lane.device),
            closing(lane.images(batches[done:])) as loaded,
        ):
            if random is not None:
                set_random_state(random, lane.device)
            for indices, images in loaded:
                loss = lane.step(indices, images, share=done / len(batches))
                self.total += loss.double() * len(indices)
                done += 1
                yield done

    def settle(self, done: int) -> int:
        """See ``Steps``."""
        return done

    def close(self) -> None:
        """See ``Steps``; there is nothing to leave."""

    def random_state(self) -> dict[str, Tensor]:
        """The global generators, of the CPU and of the device."""
        return random_state(self.lane.device)
