"""Whether a study file, its study and the data fit together, asked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FixedTrial

from tuner.datasets import Data
from tuner.errors import DataError, TunerError
from tuner.seeding import seeded
from tuner.study import StudyFile

SHOWN = 5


def check_data(attrs: Mapping[str, Any], data: Data, name: str) -> None:
    """Refuse to work on other data than those of the study ``name`` with these attributes.

    Raises:
        DataError: The fingerprints differ.
    """
    known = attrs.get("fingerprint")
    if known is not None and known != data.fingerprint:
        raise DataError(
            f"the data are not those study {name!r} was created with (fingerprint "
            f"{data.fingerprint[:12]}, the study has {known[:12]}); use the same files "
            "and the same version of Tuner, "
            "or give the study a new name"
        )


def check_fit(file: StudyFile, data: Data) -> None:
    """Refuse what cannot work with these data, before anything is trained.

    Raises:
        DataError: The validation part cannot estimate the objective at all, or a test image
            is broken.
        TunerError: A model of the space cannot be built for these images.
    """
    counts = data.validation.targets.bincount(minlength=data.num_classes)
    floor = file.objective.floor
    for metric in [file.objective.metric, *([floor.metric] if floor else [])]:
        classes = data.groups.named().get(metric.removesuffix("_accuracy"))
        if classes is not None and not counts[list(classes)].any():
            raise DataError(_without_images(metric, classes, data))
    _check_models(file, data)
    # Decodes the test images once, where they are few enough to be held in memory.
    _ = data.test


def _without_images(metric: str, classes: Sequence[int], data: Data) -> str:
    """Why a group's metric cannot be estimated, and what to do."""
    counts = data.class_counts.tolist()
    found = [f"{data.class_names[c]} ({counts[c]} in training)" for c in classes[:SHOWN]]
    more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
    where = (
        "give it more images, raise data.validation_fraction"
        if data.carved
        else "put some into the validation folder"
    )
    return (
        f"{metric} cannot be estimated: there is no validation image of its "
        f"{'class' if len(classes) == 1 else 'classes'}, {', '.join(found)}{more}; "
        f"{where}, widen data.tail, or take another metric"
    )


def _check_models(file: StudyFile, data: Data) -> None:
    for params in file.space.variants("model"):
        recipe = file.space.suggest(FixedTrial(params))
        try:
            with seeded("check"):
                recipe.model.build(data.num_classes, data.image_shape, head=recipe.loss.head)
        except TunerError as error:
            raise TunerError(f"study {file.name}: model: {error}") from None
