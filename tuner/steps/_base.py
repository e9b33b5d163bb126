"""What every execution of steps offers to the training loop."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Steps(Protocol):
    """Executes the steps of one lane, epoch after epoch."""

    total: Tensor
    """Sum of the losses of the epoch's samples so far, float64."""

    def run(
        self, batches: Sequence[Tensor], done: int, random: Mapping[str, Tensor] | None
    ) -> Generator[int | None, None, None]:
        """Execute the batches of an epoch from step ``done`` on.

        Yields the number of steps that are done whenever the caller may ask for a stop, and None
        where it would wait for the device: others may use the time.

        Args:
            batches: Indices of all batches of the epoch.
            done: How many of them were trained on before.
            random: State of the random numbers that the model draws (see ``random_state``);
                None for that of the epoch's beginning.
        """

    def settle(self, done: int) -> int:
        """Wait until nothing is under way; the steps that are done then, at least ``done``."""

    def close(self) -> None:
        """Leave the lane to itself: it is over, or goes on elsewhere."""

    def random_state(self) -> dict[str, Tensor]:
        """State of the random numbers that the model draws, between two steps."""
