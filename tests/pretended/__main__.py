"""``python -m pretended [options of pytest]``: pytest in a process with a pretended GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pretended import environment, why_not


def main() -> int:
    """Exit status of pytest."""
    reason = why_not()
    if reason is not None:
        sys.exit(f"no GPU can be pretended here: that {reason}")
    command = [sys.executable, "-m", "pytest", "-p", "pretended", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.call(command, env={**os.environ, **environment(Path(folder))})


if __name__ == "__main__":
    sys.exit(main())
