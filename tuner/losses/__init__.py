"""Losses for imbalanced classification, and the components that search over them."""

from __future__ import annotations

from tuner.losses._adjusted import (
    BalancedSoftmax,
    BalancedSoftmaxLoss,
    LogitAdjusted,
    LogitAdjustedLoss,
    VectorScaling,
    VectorScalingLoss,
)
from tuner.losses._asymmetric import (
    Asymmetric,
    AsymmetricLoss,
    WeightedAsymmetric,
    WeightedAsymmetricLoss,
)
from tuner.losses._base import LOSSES, Loss, LossComponent, LossOptions, Reduction
from tuner.losses._class_balanced import ClassBalanced, ClassBalancedLoss
from tuner.losses._cross_entropy import (
    CrossEntropy,
    CrossEntropyLoss,
    WeightedCrossEntropy,
    WeightedCrossEntropyLoss,
)
from tuner.losses._equalization import Equalization, EqualizationLoss, equalization_draws
from tuner.losses._fnr import FnrAdaptive, FnrAdaptiveLoss
from tuner.losses._focal import Focal, FocalLoss, SigmoidFocalLoss
from tuner.losses._ldam import Ldam, LdamLoss
from tuner.losses._smoothing import (
    LabelAwareSmoothing,
    LabelAwareSmoothingLoss,
    LabelSmoothing,
    LabelSmoothingLoss,
)
from tuner.losses._weights import class_balanced_weights, frequency_weights

__all__ = [
    "LOSSES",
    "Asymmetric",
    "AsymmetricLoss",
    "BalancedSoftmax",
    "BalancedSoftmaxLoss",
    "ClassBalanced",
    "ClassBalancedLoss",
    "CrossEntropy",
    "CrossEntropyLoss",
    "Equalization",
    "EqualizationLoss",
    "FnrAdaptive",
    "FnrAdaptiveLoss",
    "Focal",
    "FocalLoss",
    "LabelAwareSmoothing",
    "LabelAwareSmoothingLoss",
    "LabelSmoothing",
    "LabelSmoothingLoss",
    "Ldam",
    "LdamLoss",
    "LogitAdjusted",
    "LogitAdjustedLoss",
    "Loss",
    "LossComponent",
    "LossOptions",
    "Reduction",
    "SigmoidFocalLoss",
    "VectorScaling",
    "VectorScalingLoss",
    "WeightedAsymmetric",
    "WeightedAsymmetricLoss",
    "WeightedCrossEntropy",
    "WeightedCrossEntropyLoss",
    "class_balanced_weights",
    "equalization_draws",
    "frequency_weights",
]
