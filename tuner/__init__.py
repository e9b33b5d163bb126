"""Hyperparameter optimisation for classifiers trained on imbalanced data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.loaded import LoadedRecipe, load_recipe

__version__ = "0.1.0"
__all__ = ["LoadedRecipe", "__version__", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import torch only when a recipe is really loaded."""
    if name in ("LoadedRecipe", "load_recipe"):
        from tuner import loaded

        return getattr(loaded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
