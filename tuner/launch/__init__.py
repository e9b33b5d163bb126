"""Workers on many machines at once: placed by Ray, or submitted to Slurm."""

from tuner.launch._place import Place

__all__ = ["Place"]
