"""Attempts, leases, workers, epochs and orders: our tables, and fenced writes to Optuna's."""

from tuner.ledger._changes import (
    Changes,
    Ending,
    Lease,
    LeaseLostError,
    Limits,
    Order,
    SupersededError,
    WorkerAliveError,
)
from tuner.ledger._clock import read_now
from tuner.ledger._fenced import FencedStorage, View
from tuner.ledger._ledger import Ledger
from tuner.ledger._reads import LEASE_SECONDS
from tuner.ledger._schema import newer, newest, prepare, prepared, version
from tuner.ledger._tables import clocks

__all__ = [
    "LEASE_SECONDS",
    "Changes",
    "Ending",
    "FencedStorage",
    "Lease",
    "LeaseLostError",
    "Ledger",
    "Limits",
    "Order",
    "SupersededError",
    "View",
    "WorkerAliveError",
    "clocks",
    "newer",
    "newest",
    "prepare",
    "prepared",
    "read_now",
    "version",
]
