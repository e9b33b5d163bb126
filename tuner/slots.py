"""Which slots a machine has: shares of its devices and processor, each worked by one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuner.errors import TunerError

MOST_PER_GPU = 16
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LANES = "TUNER_LANES"
CGROUP = Path("/sys/fs/cgroup")
CORES, BESIDE = "TUNER_CORES", "TUNER_SLOTS_ON_DEVICE"


@dataclass(frozen=True)
class SlotPlan:
    """One slot: its name on this machine, its device, and what its process is started with."""

    name: str
    device: str
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_slots(
    device: str | None = None,
    *,
    cores: int,
    visible: Sequence[str] = (),
    gpus: str | None = None,
    slots: int | None = None,
    slots_per_gpu: Callable[[Sequence[str]], Sequence[int]] | None = None,
    threads: int | None = None,
) -> list[SlotPlan]:
    """The slots of a machine, in the order in which they are started.

    On the processor there is one per core with one thread each; fewer ``slots`` share the
    cores as threads. On GPUs there is one per GPU, or as many as ``slots_per_gpu`` says for it;
    each sees its own GPU and no other. The GPUs' first slots come before their second ones.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` or another of torch's; by default GPUs if there
            are any.
        cores: Cores that this process may use.
        visible: Names of the GPUs, as ``CUDA_VISIBLE_DEVICES`` takes them.
        gpus: ``all``, or positions in ``visible`` or names from it, with commas between.
        slots: How many, on anything but GPUs.
        slots_per_gpu: How many each of some GPUs gets, by their names.
        threads: Threads of each slot, if not as above.

    Raises:
        TunerError: The choices exclude each other, or a GPU is not there.
    """
    if device is None:
        device = "cuda" if gpus is not None or visible else "cpu"
    kind, _, index = device.partition(":")
    if kind != "cuda":
        _only_for_gpus(device, {"--gpus": gpus, "--slots-per-gpu": slots_per_gpu})
        count = slots or (cores if kind == "cpu" else 1)
        return _side_by_side(device, count, cores, threads)
    if slots is not None:
        raise TunerError("--slots is for the processor; on GPUs it is --slots-per-gpu")
    if index and gpus is not None:
        raise TunerError(f"--device {device} names a GPU already; leave it or --gpus out")
    names = chosen_gpus(gpus or index or "all", visible)
    counts = slots_per_gpu(names) if slots_per_gpu else [1] * len(names)
    # The processor only feeds a GPU; threads that wait for each other would slow it down.
    return _on_gpus(names, counts, cores, threads or 1)


def _side_by_side(device: str, count: int, cores: int, threads: int | None) -> list[SlotPlan]:
    """Slots that share the processor, or another device that is no GPU of CUDA's."""
    share = max(1, cores // count)
    environment = {**_budget(threads or share), **share_of(share, count)}
    return [SlotPlan(str(i), device, threads or share, environment) for i in range(count)]


def _on_gpus(
    names: Sequence[str], counts: Sequence[int], cores: int, threads: int
) -> list[SlotPlan]:
    """As many slots as ``counts`` say on each GPU, the GPUs' first ones first."""
    rounds = range(max(counts))
    shares = [n for turn in rounds for n, many in zip(names, counts, strict=True) if turn < many]
    own = max(1, cores // len(shares))
    environments = [
        {
            **_budget(threads),
            **share_of(own, shares.count(name)),
            "CUDA_VISIBLE_DEVICES": name,
        }
        for name in shares
    ]
    return [SlotPlan(str(i), "cuda", threads, each) for i, each in enumerate(environments)]


def lanes_on(device: str, asked: int | None = None) -> int | None:
    """How many trials train side by side on a device at most; None: as many as a probe finds.

    It is as ``--lanes`` asks for, else as ``TUNER_LANES`` says, which may stand where there is no
    GPU too: there is no side by side on anything else.

    Raises:
        TunerError: It was asked for on something else, or the environment says no such number.
    """
    said = os.environ.get(LANES, "")
    if said and (not said.isdecimal() or int(said) < 1):
        raise TunerError(f"{LANES}={said}: give a number from 1 up, or leave it out")
    if device.partition(":")[0] != "cuda":
        _only_for_gpus(device, {"--lanes": asked})
        return None
    return int(said) if said and asked is None else asked


def _only_for_gpus(device: str, options: Mapping[str, object]) -> None:
    for name, given in options.items():
        if given is not None:
            raise TunerError(
                f"{name} is for GPUs, and the device is {device}; leave it out, or give "
                "--device cuda"
            )


def _budget(threads: int) -> dict[str, str]:
    return dict.fromkeys(THREAD_SETTINGS, str(threads))


def visible_gpus(count: int, mask: str | None) -> list[str]:
    """Names of the GPUs a process may use, as ``CUDA_VISIBLE_DEVICES`` takes them.

    Args:
        count: How many this process sees.
        mask: Its ``CUDA_VISIBLE_DEVICES``: numbers, or names beginning with GPU- or MIG-.
    """
    if mask is None:
        return [str(index) for index in range(count)]
    names = [name.strip() for name in mask.split(",") if name.strip()]
    # A process sees only the first of several MIG devices, but each slot may have its own.
    return names if names and names[0].startswith("MIG-") else names[:count]


def chosen_gpus(asked: str, visible: Sequence[str]) -> list[str]:
    """The GPUs that ``asked`` means: ``all``, or positions in ``visible`` or names from it.

    Raises:
        TunerError: There is no such GPU.
    """
    if not visible:
        raise TunerError(
            "there is no GPU that torch can use here; leave --gpus out for --device cpu"
        )
    if asked == "all":
        return list(visible)
    known = {str(index): name for index, name in enumerate(visible)}
    known |= {name: name for name in visible if not name.isdigit()}
    wanted = [part.strip() for part in asked.split(",")]
    for part in wanted:
        if part not in known:
            raise TunerError(f"no GPU {part!r} here; there are: {', '.join(known)}")
    return list(dict.fromkeys(known[part] for part in wanted))


def slots_that_fit(per_slot: int, total: int, cores: int) -> int:
    """How many slots of ``per_slot`` bytes a GPU of ``total`` bytes holds, a tenth kept free.

    At least one, at most ``MOST_PER_GPU`` or one per core.
    """
    return max(1, min(int(0.9 * total // per_slot), MOST_PER_GPU, cores))


def usable_cores() -> int:
    """Cores that this process may use: by its affinity and the quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cpu_quota(_control_groups())
    return cores if quota is None else max(1, min(cores, int(quota)))


def share_of(cores: int, slots: int) -> dict[str, str]:
    """What tells a process its share: that many cores, and a device with so many slots."""
    return {CORES: str(cores), BESIDE: str(slots)}


def own_cores() -> int:
    """Cores that this process may keep busy: its slot's share, else all that it may use."""
    return _told(CORES) or usable_cores()


def slots_on_device() -> int:
    """How many slots share the device of this process, itself one of them."""
    return _told(BESIDE) or 1


def _told(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def cpu_quota(folders: Iterable[Path]) -> float | None:
    """The tightest limit among control groups, in cores; None when there is none."""
    found = []
    for folder in folders:
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                words = " ".join((folder / name).read_text() for name in files).split()
                quota, period = (float(word) for word in words)
            except (OSError, ValueError):  # "max" is no number, and no limit
                continue
            if quota > 0:
                found.append(quota / period)
    return min(found, default=None)


def _control_groups() -> list[Path]:
    """Folders of this process's control groups and of all they are in, of both versions."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            root = CGROUP / controllers if controllers else CGROUP
            own = root / path.lstrip("/")
            folders += [own, *(p for p in own.parents if p.is_relative_to(root))]
    return folders
