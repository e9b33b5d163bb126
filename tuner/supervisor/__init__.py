"""The slots of one machine: a fresh process each, kept at work until the study is done."""

from tuner.supervisor._child import TEMPORARY, Say
from tuner.supervisor._supervisor import Supervisor
from tuner.supervisor._watch import Sight, Watch

__all__ = ["TEMPORARY", "Say", "Sight", "Supervisor", "Watch"]
