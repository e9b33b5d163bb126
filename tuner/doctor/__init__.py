"""What can be wrong around a study, each found by one check that says what to do."""

from __future__ import annotations

from tuner.doctor._examine import Patient, examine
from tuner.doctor._finding import Finding

__all__ = ["Finding", "Patient", "examine"]
