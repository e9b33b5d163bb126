"""One process in front of the database for many workers: its server, and the ledger through it."""

from __future__ import annotations

from tuner.proxy._client import RemoteLedger
from tuner.proxy._wire import METHODS

__all__ = ["METHODS", "RemoteLedger"]
