"""History of Tuner's own tables, for Alembic."""
