"""Features of a frozen backbone, made once per machine and read by all its processes."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tuner.alone import Stop, Stopped, alone, half_written, make_room, note_use
from tuner.augment import Augmenter
from tuner.chunks import cached_batch
from tuner.datasets import Data, Images
from tuner.errors import TunerError
from tuner.models import Classifier
from tuner.seeding import generator
from tuner.slots import own_cores

LAYOUT = "tuner-features-1"
BATCH, PIXELS = 512, 2**21
"""Most images, and most pixels of a channel, that are loaded at a time."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Features:
    """What a backbone makes of the images: all that training a classifier needs.

    Values are divided by ``scale``, which brings their mean square to about 1 and keeps them
    within float16: the backbone's own features are ``train * scale``.

    Attributes:
        train: Features of the augmented copies of the training images, (A, N, D) float16.
        train_targets: Their classes, (N,) int64.
        validation: Features of the validation images as they are, (V, D) float16.
        scale: What the values were divided by.
        key: Hash of everything that the values depend on.
    """

    train: Tensor
    train_targets: Tensor
    validation: Tensor
    scale: float
    key: str

    def to(self, device: torch.device | str) -> Features:
        """The same with the values on ``device``; the classes stay, as plans are made of them."""
        train, validation = self.train.to(device), self.validation.to(device)
        return replace(self, train=train, validation=validation)


def cached_features(
    model: Classifier,
    data: Data,
    augment: Augmenter,
    *,
    copies: int,
    seed: int,
    folder: Path,
    stop: Stop = lambda: False,
) -> Features:
    """Features of the backbone of ``model``, from ``folder`` or made and left there.

    Of the processes of a machine only one computes; the others wait, and all map the same
    file into memory. A file that is truncated or is none is made again. Features that were not
    used for longest make room for new ones.

    The first copy of the training images is as they are, the others are augmented. Nothing
    is mixed: targets of mixed images would be soft, and mixing acts on pixels; so mixup and
    cutmix have no effect on the features.

    Raises:
        TunerError: The augmenter mixes images even at the end of training, or the features
            are not finite.
        OSError: They cannot be kept in the folder; nothing of them is left there.
        Stopped: ``stop`` said so between batches, or while another process computed.
    """
    key = _key(model, data, augment, copies, seed)
    path = Path(folder) / f"{key}.safetensors"
    with alone(path, stop):
        found = _read(path)
        if found is None:
            log.info(
                "making features, once for this machine: of %d images, %d copies, and of %d others",
                *(len(data.train), copies, len(data.validation)),
            )
            _write(path, _compute(model, data, augment, copies, seed, stop))
            found = _read(path)
    if found is None:
        raise TunerError(f"{path}: cannot be read although it was just written; is the disk full?")
    tensors, scale = found
    return Features(**tensors, scale=scale, key=key)


def _key(model: Classifier, data: Data, augment: Augmenter, copies: int, seed: int) -> str:
    known = (
        *(LAYOUT, data.fingerprint, copies, seed, batch_size(data.image_shape)),
        *(repr(model.backbone), model.repeat_channels),
    )
    total = hashlib.sha256(repr(known).encode())
    about = (type(augment).__qualname__, getattr(augment, "settings", None))
    total.update(repr(about).encode())
    for module in (model.backbone, augment):
        _digest(total, module)
    return total.hexdigest()


def batch_size(image_shape: tuple[int, int, int]) -> int:
    """Images loaded at a time: the same on every device, as augmentation is drawn by batch."""
    _, height, width = image_shape
    return max(1, min(BATCH, PIXELS // (height * width)))


def _digest(total: Any, module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        total.update(flat.numpy().tobytes())


def _read(path: Path) -> tuple[dict[str, Tensor], float] | None:
    """Memory-mapped tensors and the scale; None where there is no whole file of this layout."""
    try:
        note_use(path)
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            names = ("train", "train_targets", "validation")
            if meta.get("format") != LAYOUT or {*names} - {*file.keys()}:
                return None
            return {name: file.get_tensor(name) for name in names}, json.loads(meta["scale"])
    except (FileNotFoundError, safetensors.SafetensorError, ValueError, KeyError):
        return None


def _write(path: Path, made: tuple[dict[str, Tensor], float]) -> None:
    """Put the file in place whole, after others have made room for it.

    Raises:
        OSError: It cannot be written.
    """
    tensors, scale = made
    make_room(path, sum(tensor.nbytes for tensor in tensors.values()), at_any_cost=True)
    meta = {"format": LAYOUT, "scale": json.dumps(scale)}
    with half_written(path) as half:
        try:
            safetensors.torch.save_file(tensors, half, metadata=meta)
        except safetensors.SafetensorError as error:  # also says that the disk is full
            raise OSError(str(error)) from error


def _compute(
    model: Classifier, data: Data, augment: Augmenter, copies: int, seed: int, stop: Stop
) -> tuple[dict[str, Tensor], float]:
    """Features of every copy, in evaluation mode and float32."""
    training = model.training
    model.eval()
    try:
        maker = _Maker(model, augment, stop)
        validation = maker.features(data.validation.images, None, None)
        scale = float(validation.double().square().mean().sqrt()) or 1.0
        maker.scale = scale
        train = torch.stack([maker.copy(data, copy, seed) for copy in range(copies)])
    finally:
        model.train(training)
    tensors = {
        "train": train,
        "train_targets": data.train.targets.cpu().long(),
        "validation": (validation / scale).half(),
    }
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise TunerError("the backbone's features are not finite; train or choose another backbone")
    return tensors, scale


class _Maker:
    """Makes features batch by batch."""

    def __init__(self, model: Classifier, augment: Augmenter, stop: Stop) -> None:
        self.model, self.augment, self.stop, self.scale = model, augment, stop, 1.0
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def copy(self, data: Data, copy: int, seed: int) -> Tensor:
        """Features (N, D) float16 of one copy of the training images; the first is plain."""
        draws = generator(seed, "features", copy) if copy else None
        images, targets = data.train.images, data.train.targets
        return self.features(images, targets, draws)

    @torch.inference_mode()
    def features(
        self, images: Images, targets: Tensor | None, draws: torch.Generator | None
    ) -> Tensor:
        """Features (N, D) in the order of the images, augmented if there are ``draws``."""
        batches = torch.split(torch.arange(len(images)), batch_size(images.shape))
        pin = self.device.type == "cuda"
        loaded = images.batches(batches, workers=own_cores(), pin=pin)
        made = []
        for indices, batch in zip(batches, loaded, strict=True):
            if self.stop():
                raise Stopped
            inputs = self._inputs(batch.to(self.device), indices, targets, draws)
            found = torch.cat(
                [self._made(some) for some in torch.split(inputs, self._at_once(inputs))]
            )
            made.append((found / self.scale).to(self._dtype(targets)).cpu())
        return torch.cat(made)

    def _made(self, inputs: Tensor) -> Tensor:
        """Features (n, D) float32 of normalised images (n, c, H, W)."""
        found: Tensor = self.model.features(inputs.contiguous(memory_format=torch.channels_last))
        return found.float()

    def _at_once(self, inputs: Tensor) -> int:
        """Images that the backbone sees at a time: on a processor few maps fit into its cache."""
        return cached_batch(*inputs.shape[-2:]) if self.device.type == "cpu" else len(inputs)

    def _inputs(
        self,
        batch: Tensor,
        indices: Tensor,
        targets: Tensor | None,
        draws: torch.Generator | None,
    ) -> Tensor:
        if targets is None or draws is None:
            return self.augment.normalize(batch)
        own = targets[indices.to(targets.device)].to(self.device)
        inputs: Tensor
        inputs, after = self.augment(batch, own, draws, 1.0)
        if after.ndim != 1:
            raise TunerError(
                f"{type(self.augment).__name__} mixes images at progress 1; the head rung needs "
                "an augmentation that can do without"
            )
        return inputs

    @staticmethod
    def _dtype(targets: Tensor | None) -> torch.dtype:
        return torch.float32 if targets is None else torch.float16
