"""Runs the migrations over the connection that ``tuner.ledger`` hands in."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table="tuner_version")
with context.begin_transaction():
    context.run_migrations()
