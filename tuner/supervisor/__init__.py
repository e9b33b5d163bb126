"""The slots of one machine: a fresh process each, kept at work until the study is done."""

from tuner.supervisor._child import TAKEN, TEMPORARY, Say
from tuner.supervisor._supervisor import Supervisor
from tuner.supervisor._watch import Sight, Watch

__all__ = ["TAKEN", "TEMPORARY", "Say", "Sight", "Supervisor", "Watch"]
