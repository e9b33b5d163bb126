"""The dashboard: optuna-dashboard and our reports over a storage, to look at and no more."""

from __future__ import annotations

from tuner.web._app import dashboard_app
from tuner.web._guards import loopback_only, read_only
from tuner.web._serve import listen, serve

__all__ = ["dashboard_app", "listen", "loopback_only", "read_only", "serve"]
