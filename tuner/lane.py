"""One trial in training: its model, optimizer, loss, samplers and random state."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuner.augment import Drawn, StandardAugmenter, on_device
from tuner.checkpoint import Snapshot
from tuner.chunks import logits_in_chunks, number_of_chunks
from tuner.compiled import Forward, compiled
from tuner.datasets import Data, Images, ResidentImages
from tuner.fused import FusedPasses, can_fuse
from tuner.kept import keep_memory
from tuner.lane_logits import logits_of
from tuner.lane_state import restore, snapshot
from tuner.losses import Loss, LossComponent
from tuner.models import Classifier, set_head_bias
from tuner.optim import for_device
from tuner.placing import placed
from tuner.recipe import Recipe, dump_component
from tuner.seeding import derive_seed, generator, seeded
from tuner.slots import own_cores
from tuner.training import batches_of, for_each_stage


class Lane:
    """Everything one recipe trains with; starts at epoch 0 with freshly seeded weights.

    ``micro_batch`` is the largest number of images, at least 2, whose activations are in
    memory at a time; None for whole batches. It is no part of the recipe: see ``epochs``.
    ``dtype`` is that of the weights; float64 is for tests.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        device: str,
        *,
        micro_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if micro_batch is not None and micro_batch < 2:
            raise ValueError(f"micro_batch must be at least 2, not {micro_batch}")
        self.recipe, self.data, self.device = recipe, data, torch.device(device)
        keep_memory(self.device.type)
        self.micro_batch, self.dtype = micro_batch, dtype
        self.epoch = self.stage = 0
        self.compiles = False
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.generator = generator(recipe.seed, "augment")
        self.model = self._build_model()
        fuses = recipe.training.layout == "fused" and can_fuse(self.device)
        self.fused = FusedPasses(self.model) if fuses else None
        self.fused_backbone = FusedPasses(self.model.backbone) if fuses else None
        losses = recipe.training.losses(recipe.loss)
        self.losses: list[Loss] = for_each_stage(
            losses, lambda loss, _: self.built(loss).to(self.device)
        )
        samplers = recipe.training.samplers(recipe.sampler)
        self.samplers: list[Any] = for_each_stage(samplers, self._build_sampler)
        self.augment = recipe.augment.build(
            data.image_shape,
            mean=data.mean,
            std=data.std,
            class_counts=data.class_counts,
            groups=data.groups,
        ).to(self.device)
        self.crops = self._crops()
        self.train_targets = data.train.targets.to(self.device)
        self.optimizer = self.build_optimizer()

    def _build_model(self) -> Classifier:
        recipe, data = self.recipe, self.data
        with seeded(recipe.seed, "weights"):
            model: Classifier = recipe.model.build(
                data.num_classes, data.image_shape, head=recipe.loss.head
            )
        self._set_head_bias(model)
        return model.to(self.device, self.dtype).to(memory_format=self._layout)  # type: ignore[call-overload, no-any-return]

    def built(self, loss: LossComponent) -> Loss:
        """A loss of the recipe on the CPU, as it stands at the beginning of the training."""
        return loss.build(self.data.class_counts).follow(self.recipe.seed)

    def _build_sampler(self, component: Any, stage: int) -> Any:
        seed = derive_seed(self.recipe.seed, "sampler", stage)
        return component.build(self.data.train.targets.cpu(), seed=seed, groups=self.data.groups)

    def _set_head_bias(self, model: Classifier) -> None:
        """Start a sigmoid-type loss at the prior 1/C (Cui et al. 2019)."""
        bias = self.recipe.loss.head_bias(self.data.num_classes)
        if bias is not None:
            set_head_bias(model, bias)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer that has not taken a step, over what the stage at hand trains."""
        free = self.recipe.loss.head_bias(self.data.num_classes) is not None
        optimizer = self.recipe.optimizer.build(self.model, no_decay=("head.bias",) if free else ())
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        for_device(optimizer, self.device)
        return optimizer  # type: ignore[no-any-return]

    @property
    def loss(self) -> Loss:
        """The loss of the stage at hand."""
        return self.losses[self.stage]

    @property
    def _layout(self) -> torch.memory_format:
        plain = self.recipe.training.layout == "contiguous"
        return torch.contiguous_format if plain else torch.channels_last

    @property
    def progress(self) -> float:
        """Share of the training's optimizer steps that are done before this epoch, in [0, 1]."""
        return self.epoch / self.recipe.epochs

    def begin_epoch(self) -> None:
        """Enter the stage of the coming epoch and switch on what is deferred until now.

        Also after ``restore``: an epoch that was begun before is begun as it was.
        """
        stage = self.recipe.training.stage(self.progress)
        if stage != self.stage:
            self._enter_stage(stage)
        self.loss.advance(self.progress)
        self.loss.train()
        self.model.train()
        if self._classifier_only():
            self.model.backbone.eval()

    def _classifier_only(self) -> bool:
        return self.stage > 0 and bool(self.recipe.training.classifier_only)

    def _enter_stage(self, stage: int) -> None:
        self.stage = stage
        training = self.recipe.training
        if training.reset_head:
            with seeded(self.recipe.seed, "head", stage, device=self.device):
                self.model.head.reset_parameters()
            self._set_head_bias(self.model)
        self.freeze()
        if training.reset_head or training.classifier_only:
            self.optimizer = self.build_optimizer()

    def freeze(self) -> None:
        """Hold fixed what the stage at hand does not train."""
        if self._classifier_only():
            self.model.backbone.requires_grad_(False)

    def plan(self) -> list[Tensor]:
        """Indices of the coming epoch, batch by batch: as many for every sampler."""
        indices = self.samplers[self.stage].epoch(self.progress)
        return batches_of(indices, self.recipe.training.batch_size)

    def images(
        self, batches: Sequence[Tensor]
    ) -> Generator[tuple[Tensor, Tensor | None], None, None]:
        """Indices and uint8 images (B, c, H, W) of every batch; None where they are crops."""
        if self.crops is not None:
            yield from ((indices, None) for indices in batches)
        else:
            yield from zip(batches, self.load(self.data.train.images, batches), strict=True)

    def _crops(self) -> Tensor | None:
        """A view of all crops of all images, where these lie in memory and are cropped at all."""
        source, augment = self.data.train.images, self.augment
        if type(augment) is not StandardAugmenter or not isinstance(source, ResidentImages):
            return None
        return source.crops(augment.margin) if augment.margin > 0 else None

    def load(self, images: Images, batches: Sequence[Tensor]) -> Generator[Tensor, None, None]:
        """Images of every batch; files are decoded ahead by processes of their own."""
        yield from images.batches(batches, workers=own_cores(), pin=self.device.type == "cuda")

    def step(self, indices: Tensor, images: Tensor | None, *, share: float) -> Tensor:
        """One optimizer step at ``share`` of the epoch; the batch's loss, detached."""
        there = placed(indices, self.device)
        targets = self.train_targets[there]
        for group, rate in zip(self.optimizer.param_groups, self.rates(share), strict=True):
            group["lr"] = rate
        if images is not None:
            images = images.to(self.device, non_blocking=True)
            inputs, soft = self.augment(images, targets, self.generator, self.progress)
        else:
            size = self.data.image_shape[1:]
            drawn = self.augment.draw(len(indices), size, self.generator, self.progress)
            inputs, soft = self.inputs(there, targets, on_device(drawn, self.device))
        loss, losses = self.learn(inputs, soft, targets)
        if losses is not None:
            self.noted.append((indices, losses))
        return loss

    def inputs(self, indices: Tensor, targets: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Augmented images in memory, and their targets; see ``Augmenter.transform``."""
        crops = self.crops
        if crops is not None:
            return self.augment.transform_crops(crops, indices, targets, drawn)  # type: ignore[no-any-return]
        images: Tensor = self.data.train.images.at(indices)  # type: ignore[union-attr]
        return self.augment.transform(images, targets, drawn)  # type: ignore[no-any-return]

    def learn(self, inputs: Tensor, soft: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """One optimizer step from augmented images; nothing is drawn but by the model.

        Returns:
            The batch's loss, detached, and for a sampler that asks for them the cross-entropy of
            each image (B,).
        """
        logits = self._training_logits(inputs)
        losses = None
        if self.samplers[self.stage].needs_losses:
            losses = nn.functional.cross_entropy(logits.detach(), targets, reduction="none")
        loss: Tensor = self.loss(logits, soft)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach(), losses

    def end_epoch(self) -> None:
        """Hand the epoch's losses to a sampler that asks for them, and count the epoch."""
        if self.noted:
            self.samplers[self.stage].observe(**self.noted_losses())
            self.noted.clear()
        self.epoch += 1

    def noted_losses(self) -> dict[str, Tensor]:
        """Indices (n,) and losses (n,) that this epoch noted so far; empty when it noted none."""
        if not self.noted:
            return {}
        indices, losses = zip(*self.noted, strict=True)
        return {"indices": torch.cat(indices), "losses": torch.cat(losses)}

    def _training_logits(self, inputs: Tensor) -> Tensor:
        chunks = number_of_chunks(len(inputs), self.micro_batch)
        if chunks > 1:
            return logits_in_chunks(self.forward, inputs, chunks, self.model)
        return self.forward(inputs, compiled(self.model, self.kind) if self.compiles else None)

    @property
    def kind(self) -> str:
        """What compiled training passes are made for: model, head, images and number formats."""
        model = dump_component("model", self.recipe.model)
        training, shape = self.recipe.training, self.data.image_shape
        return f"{model} {self.recipe.loss.head} {shape} {training.precision} {training.layout}"

    def forward(self, inputs: Tensor, run: Forward | None = None) -> Tensor:
        """Logits of augmented images by the model, or by ``run`` in its place."""
        with self.half():
            logits: Tensor = (run or self.fused or self.model)(self.laid_out(inputs))
        return logits.to(self.dtype)

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Images as the model takes them: number format and memory layout."""
        return inputs.to(self.dtype).contiguous(memory_format=self._layout)

    def half(self) -> torch.autocast:
        """Where the recipe says so, the model's products are in bfloat16."""
        half = self.recipe.training.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def rates(self, share: float) -> list[float]:
        """Learning rate of each parameter group at ``share`` of the epoch."""
        epoch, epochs = self.epoch + share, self.recipe.epochs
        training = self.recipe.training
        if self.stage > 0 and training.restart_schedule:
            first = self.recipe.switch_epoch()
            epoch, epochs = epoch - first, epochs - first
        factor = self.recipe.schedule.factor(epoch, epochs)
        return [group["base_lr"] * factor for group in self.optimizer.param_groups]

    def logits(self, images: Images, between: Callable[[float], None] = lambda _: None) -> Tensor:
        """Logits (N, C) float32 of ``images``, on the CPU, in evaluation mode.

        ``between`` batches is told the share of them that is done, and may raise.
        """
        return logits_of(self, images, between)

    def snapshot(self) -> Snapshot:
        """Copy of everything that changes during training."""
        return snapshot(self)

    def restore(self, state: Snapshot) -> None:
        """Go on from ``state``: of the same recipe, or of a stage shared with another one.

        Raises:
            ValueError: The snapshot belongs to another recipe.
        """
        restore(self, state)
