"""Checks of this machine: versions, processor, memory, GPUs, and where artifacts go."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tuner.doctor._finding import Finding, fail, gibibytes, ok, warn
from tuner.slots import usable_cores
from tuner.stores import FolderStore, StoreError, open_store

OPTUNA = (5,)
LITTLE_MEMORY = 2 * 2**30
LITTLE_DISK, NO_DISK = 2 * 2**30, 100 * 2**20
NO_LIMIT = 2**60


def program() -> Iterator[Finding]:
    """Versions of Tuner and of what it stands on."""
    from tuner import __version__

    names = ("torch", "torchvision", "numpy", "sqlalchemy")
    found = ", ".join(f"{name} {_version(name)}" for name in names)
    yield ok("program", f"tuner {__version__}, python {platform.python_version()}, {found}")
    optuna = _version("optuna")
    if int(optuna.partition(".")[0]) not in OPTUNA:
        yield fail("optuna", f"version {optuna}", "pip install 'optuna>=5,<6'")
    else:
        yield ok("optuna", f"version {optuna}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def processor() -> Iterator[Finding]:
    """Cores and memory this process may use."""
    cores, mine = os.cpu_count() or 1, usable_cores()
    if mine < cores:
        found = f"{mine} of {cores} cores may be used here"
        yield warn("processor", found, "plan worker processes and threads for that many")
    else:
        yield ok("processor", f"{cores} cores")
    free = _free_memory()
    if free is not None and free < LITTLE_MEMORY:
        cure = "train fewer trials at once here, or free some memory"
        yield warn("memory", f"{gibibytes(free)} free", cure)
    elif free is not None:
        yield ok("memory", f"{gibibytes(free)} free")


def _free_memory() -> float | None:
    """Bytes that are available by the system's count and the control group's."""
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    known = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    if "MemAvailable:" not in known:
        return None
    most, used = (_read(f"/sys/fs/cgroup/memory.{kind}") for kind in ("max", "current"))
    left = int(most) - int(used) if most.isdigit() and used.isdigit() else NO_LIMIT
    return min(known["MemAvailable:"], left)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def gpu() -> Iterator[Finding]:
    """GPUs as torch and as the driver see them."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda, driver)
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    yield ok("gpu", f"{torch.cuda.device_count()}, torch for CUDA {torch.version.cuda}{chosen}")
    for line in driver:
        yield ok("driver", line)
    for number in range(torch.cuda.device_count()):
        yield _device(number)


def _no_gpu(built: str | None, driver: list[str]) -> Finding:
    if not driver:
        return ok("gpu", "none; trials train on the processor")
    if built is None:
        return warn(
            "gpu",
            f"{driver[0]}, but this torch is built for processors only",
            "install torch for CUDA: https://pytorch.org/get-started/locally",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ok("gpu", "hidden by CUDA_VISIBLE_DEVICES; trials train on the processor")
    return fail(
        "gpu",
        f"{driver[0]}, but torch for CUDA {built} cannot use it",
        "bring the driver up to date, or install torch for an older CUDA",
    )


def _device(number: int) -> Finding:
    import torch

    name = torch.cuda.get_device_name(number)
    free, total = torch.cuda.mem_get_info(number)
    found = f"cuda:{number} {name}, {gibibytes(free)} of {gibibytes(total)} free"
    if free < total / 2:
        cure = "others are at work on it: nvidia-smi shows who; fewer slots fit"
        return warn("gpu", found, cure)
    return ok("gpu", found)


def _driver() -> list[str]:
    """What the driver's own tool says of each GPU; nothing without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = "--query-gpu=name,driver_version,memory.total"
    try:
        done = subprocess.run(
            [tool, asked, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def artifacts(place: str | None) -> Iterator[Finding]:
    """Whether checkpoints and weights can be written, and how much room is left."""
    store = open_store(place, check=False)
    try:
        store.check()
    except StoreError as error:
        yield fail("artifacts", str(error), "name a place that can be written with --artifacts")
        return
    if not isinstance(store, FolderStore):
        yield ok("artifacts", f"{store} can be reached")
        return
    yield room("artifacts", store.root.absolute(), "checkpoints")


def room(check: str, path: Path, what: str) -> Finding:
    """How much room is left on the disk of a folder that may not exist yet."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    found = f"{path} can be written, {gibibytes(free)} free"
    if free < LITTLE_DISK:
        kind = fail if free < NO_DISK else warn
        return kind(check, found, f"make room for {what}, or name another place")
    return ok(check, found)
