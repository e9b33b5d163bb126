"""From the samples of a data set to the parts of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from tuner.datasets._data import Data, Identity, Part, duplicates, fingerprint
from tuner.datasets._decode import BrokenImagesError, broken_images
from tuner.datasets._images import channel_statistics
from tuner.datasets._sources import Source, Sources
from tuner.datasets._split import ESTIMABLE, Split, split, thin
from tuner.errors import DataError
from tuner.imbalance import TailRule, class_counts

NAMED = 10
"""How many classes a warning names; the rest are counted."""

SAID = {"train": "training"}
"""What parts are called in words, where that is not their name."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How to carve and divide samples; ``carve`` maps counts (C,) and names to counts (C,)."""

    seed: int
    validation_fraction: float
    validation_cap: int
    test_fraction: float
    carve: Callable[[Tensor, Sequence[str]], Tensor]
    carve_test: bool
    tail: TailRule


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The samples of one part: indices (n,) into a source."""

    source: Source
    indices: Tensor

    @property
    def targets(self) -> Tensor:
        return self.source.targets[self.indices]

    def identities(self) -> list[Identity]:
        return self.source.identities(self.indices)

    def broken(self) -> list[str]:
        return self.source.broken(self.indices)

    def load(self, resident_limit: int) -> Part:
        return Part(self.source.images(self.indices, resident_limit), self.targets)


def assemble(name: str, sources: Sources, rules: Rules, resident_limit: int) -> Data:
    """Divide the samples by the rules and load the training and validation parts.

    Raises:
        DataError: The profile does not fit, the tail is empty, or images are broken.
    """
    names = sources.class_names
    plan = _plan(sources, rules)
    chosen = _choose(sources, rules, plan)
    if len(chosen["validation"].indices) == 0:
        raise DataError(f"{name}: no class has the 2 images that it takes to spare one to validate")
    groups = rules.tail.groups(plan.pool_counts, names)
    try:
        train, validation = _load(chosen["train"], chosen["validation"], resident_limit)
        identities = {part: samples.identities() for part, samples in chosen.items()}
    except BrokenImagesError as error:
        raise _every_broken(chosen) or error from None
    mean, std = channel_statistics(train.images)
    classes = {part: samples.targets.tolist() for part, samples in chosen.items()}
    test = chosen.get("test")
    return Data(
        name=name,
        train=train,
        validation=validation,
        class_names=names,
        mean=mean,
        std=std,
        groups=groups,
        class_counts=class_counts(train.targets, len(names)),
        pool_counts=plan.pool_counts,
        fingerprint=fingerprint(
            name, train.images.shape, names, identities, classes, sources.decoder
        ),
        warnings=(
            *sources.warnings,
            *_small_classes(names, plan, chosen),
            *duplicates(identities),
        ),
        carved=plan.validation is not None,
        load_test=None if test is None else partial(test.load, resident_limit),
        test_images=0 if test is None else len(test.indices),
    )


def _plan(sources: Sources, rules: Rules) -> Split:
    test = rules.test_fraction if sources.test is None and rules.test_fraction > 0 else None
    return split(
        sources.train.targets,
        sources.class_names,
        seed=rules.seed,
        test_fraction=test,
        validation_fraction=rules.validation_fraction if sources.validation is None else None,
        validation_cap=rules.validation_cap,
        carve=lambda available: rules.carve(available, sources.class_names),
    )


def _choose(sources: Sources, rules: Rules, plan: Split) -> dict[str, _Chosen]:
    chosen = {"train": _Chosen(sources.train, plan.train)}
    for part, given, indices in (
        ("validation", sources.validation, plan.validation),
        ("test", sources.test, plan.test),
    ):
        if given is not None:
            chosen[part] = _Chosen(given, torch.arange(len(given.targets)))
        elif indices is not None:
            chosen[part] = _Chosen(sources.train, indices)
    if rules.carve_test and "test" in chosen:
        source, indices = chosen["test"].source, chosen["test"].indices
        kept = thin(indices, source.targets, plan.kept, sources.class_names)
        chosen["test"] = _Chosen(source, kept)
    return chosen


def _load(train: _Chosen, validation: _Chosen, resident_limit: int) -> tuple[Part, Part]:
    """Both parts; out of one source they are decoded together, so that one error names all."""
    if train.source is not validation.source:
        return train.load(resident_limit), validation.load(resident_limit)
    both = torch.cat([train.indices, validation.indices])
    images = train.source.images(both, resident_limit)
    first, second = torch.split(
        torch.arange(len(both)), [len(train.indices), len(validation.indices)]
    )
    return (
        Part(images.select(first), train.targets),
        Part(images.select(second), validation.targets),
    )


def _every_broken(chosen: dict[str, _Chosen]) -> BrokenImagesError | None:
    """An error that names the broken images of all parts at once, so that one run tells of them."""
    broken = {part: samples.broken() for part, samples in chosen.items()}
    which = " and ".join(
        f"{len(found)} of {len(chosen[part].indices)} {SAID.get(part, part)} images"
        for part, found in broken.items()
        if found
    )
    said = broken_images(list(chain.from_iterable(broken.values())), which)
    return BrokenImagesError(said) if which else None


def _small_classes(names: Sequence[str], plan: Split, chosen: dict[str, _Chosen]) -> Iterator[str]:
    """Warnings about classes whose accuracy cannot be estimated, by name."""
    for part, samples in chosen.items():
        missing = (class_counts(samples.targets, len(names)) == 0).nonzero().flatten().tolist()
        if missing:
            listed = _listed([repr(names[c]) for c in missing])
            yield f"classes without a {part} image, which no {part} metric counts: {listed}"
    small = (plan.pool_counts < ESTIMABLE).nonzero().flatten().tolist()
    if small and plan.validation is not None:
        listed = _listed([f"{names[c]!r} ({int(plan.pool_counts[c])})" for c in small])
        yield (
            f"classes with fewer than {ESTIMABLE} images for training and validation, too few "
            f"to estimate their accuracy: {listed}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
