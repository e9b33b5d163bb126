"""Samplers: which training images an epoch shows, and how often."""

from __future__ import annotations

from tuner.samplers.base import SAMPLERS, ClassSampler, SamplerComponent
from tuner.samplers.classwise import (
    ClassAware,
    EffectiveNumber,
    Natural,
    Progressive,
)
from tuner.samplers.curriculum import Curriculum, CurriculumSampler

__all__ = [
    "SAMPLERS",
    "ClassAware",
    "ClassSampler",
    "Curriculum",
    "CurriculumSampler",
    "EffectiveNumber",
    "Natural",
    "Progressive",
    "SamplerComponent",
]
