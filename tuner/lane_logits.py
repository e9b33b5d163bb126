"""What a lane's model says of images, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.chunks import evaluation_batch
from tuner.datasets import Images

if TYPE_CHECKING:
    from tuner.lane import Lane


@torch.inference_mode()
def logits_of(lane: Lane, images: Images, between: Callable[[float], None]) -> Tensor:
    """See ``Lane.logits``."""
    lane.model.eval()
    batches = torch.split(torch.arange(len(images)), _size(lane))
    parts: list[Tensor] = []
    # Closing ends the processes that load images, also while an exception is alive.
    with closing(lane.load(images, batches)) as loaded:
        for batch in loaded:
            if parts:
                between(len(parts) / len(batches))
            inputs = lane.augment.normalize(batch.to(lane.device, non_blocking=True))
            parts.append(_judged(lane, inputs))
    scale: float = lane.recipe.loss.output_scale()
    return torch.cat(parts).cpu() * scale


def _judged(lane: Lane, inputs: Tensor) -> Tensor:
    """Logits (N, C) whose last product is in full precision.

    In bfloat16, which has 256 values between one power of two and the next, the best of many
    classes tie, and a tie goes to the class that stands first: as a rule, the more frequent one.
    """
    with lane.half():
        features = lane.model.features(lane.laid_out(inputs), lane.fused_backbone)
    logits: Tensor = lane.model.head(features.to(lane.dtype))
    return logits


def _size(lane: Lane) -> int:
    """Images at once; without gradients twice as many fit."""
    most = evaluation_batch(*lane.data.image_shape[1:], lane.device)
    return min(most, 2 * (lane.micro_batch or most))
