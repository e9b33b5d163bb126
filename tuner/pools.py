"""Which connections of a pool are asked whether they are alive before they are used."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy
from sqlalchemy.engine import Engine

FRESH_SECONDS = 5.0


def check_idle(engine: Engine) -> None:
    """Check connections before use, as ``pool_pre_ping`` does, but only those that were idle.

    To ask is a round trip, and most transactions have few. One that finds the connection broken
    fails with an error that passes, and is run again.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    @sqlalchemy.event.listens_for(engine, "checkin")
    def _used(_connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    @sqlalchemy.event.listens_for(engine, "checkout")
    def _checkout(connection: Any, record: Any, _proxy: object) -> None:
        if time.monotonic() - record.info["used"] < FRESH_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # The pool makes another connection then.
            raise sqlalchemy.exc.DisconnectionError(str(error)) from error
