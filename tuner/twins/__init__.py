"""One network that computes what K like ones do: grouped convolutions, batched products."""

from __future__ import annotations

from tuner.twins._twin import NoTwinError, Twin, check, twin_of

__all__ = ["NoTwinError", "Twin", "check", "twin_of"]
