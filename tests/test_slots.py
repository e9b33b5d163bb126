"""Which slots a machine gets, as a table; real processes are in test_supervisor.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuner.errors import TunerError
from tuner.slots import (
    SlotPlan,
    chosen_gpus,
    cpu_quota,
    lanes_on,
    own_cores,
    plan_slots,
    slots_on_device,
    slots_that_fit,
    usable_cores,
    visible_gpus,
)

GIB = 2**30


def on_cpu(*threads: int) -> list[tuple[str, str, int, str | None]]:
    return [(str(i), "cpu", own, None) for i, own in enumerate(threads)]


def on_gpus(*names: str, threads: int = 1) -> list[tuple[str, str, int, str | None]]:
    return [(str(i), "cuda", threads, name) for i, name in enumerate(names)]


def shown(plans: list[SlotPlan]) -> list[tuple[str, str, int, str | None]]:
    return [(p.name, p.device, p.threads, p.environment.get("CUDA_VISIBLE_DEVICES")) for p in plans]


TABLE: dict[str, tuple[dict[str, Any], list[tuple[str, str, int, str | None]]]] = {
    "a slot per core": ({"cores": 3}, on_cpu(1, 1, 1)),
    "fewer slots share the cores": ({"cores": 8, "slots": 2}, on_cpu(4, 4)),
    "what is left over stays idle": ({"cores": 8, "slots": 3}, on_cpu(2, 2, 2)),
    "more slots than cores": ({"cores": 2, "slots": 3}, on_cpu(1, 1, 1)),
    "threads as asked": ({"cores": 8, "slots": 2, "threads": 1}, on_cpu(1, 1)),
    "the processor though there are GPUs": (
        {"device": "cpu", "cores": 1, "visible": ["0"]},
        on_cpu(1),
    ),
    "GPUs where there are some": ({"cores": 8, "visible": ["0", "1"]}, on_gpus("0", "1")),
    "one GPU by its number": (
        {"device": "cuda:1", "cores": 8, "visible": ["0", "1"]},
        on_gpus("1"),
    ),
    "some GPUs": ({"gpus": "2,0", "cores": 8, "visible": ["0", "1", "2"]}, on_gpus("2", "0")),
    "positions among the visible ones": (
        {"gpus": "1", "cores": 8, "visible": ["4", "6"]},
        on_gpus("6"),
    ),
    "names are kept": (
        {"gpus": "all", "cores": 8, "visible": ["GPU-8932f937", "GPU-17aa02cd"]},
        on_gpus("GPU-8932f937", "GPU-17aa02cd"),
    ),
    "every GPU's first slot comes first": (
        {"cores": 8, "visible": ["0", "1"], "slots_per_gpu": lambda names: [1, 3]},
        on_gpus("0", "1", "1", "1"),
    ),
    "threads as asked on GPUs": (
        {"cores": 8, "visible": ["0"], "threads": 2},
        on_gpus("0", threads=2),
    ),
    "another device has one slot": (
        {"device": "xpu", "cores": 8},
        [("0", "xpu", 8, None)],
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_slots_are_planned(case: str) -> None:
    options, expected = TABLE[case]
    assert shown(plan_slots(**options)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": "0"}, "there is no GPU"),
        ({"device": "cuda"}, "there is no GPU"),
        ({"gpus": "2", "visible": ["0", "1"]}, "no GPU '2' here; there are: 0, 1"),
        ({"gpus": "x", "visible": ["GPU-1"]}, "no GPU 'x' here; there are: 0, GPU-1"),
        ({"gpus": "0", "device": "cpu", "visible": ["0"]}, "--gpus is for GPUs"),
        ({"slots_per_gpu": lambda _: [2]}, "--slots-per-gpu is for GPUs"),
        ({"slots": 2, "visible": ["0"]}, "--slots is for the processor"),
        ({"gpus": "0", "device": "cuda:0", "visible": ["0"]}, "names a GPU already"),
    ],
)
def test_choices_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TunerError, match=message):
        plan_slots(cores=4, **options)


@pytest.mark.parametrize(
    ("device", "asked", "said", "lanes"),
    [
        ("cuda", None, "", None),
        ("cuda:1", 3, "", 3),
        ("cuda", None, "2", 2),
        ("cuda", 3, "2", 3),
        ("cpu", None, "", None),
        ("cpu", None, "2", None),
    ],
)
def test_lanes_of_a_gpu_are_limited_by_who_asks_else_by_the_environment(
    device: str, asked: int | None, said: str, lanes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_LANES", said)
    assert lanes_on(device, asked) == lanes


def test_lanes_on_a_processor_are_refused_as_its_gpus_are() -> None:
    with pytest.raises(TunerError, match="--lanes is for GPUs, and the device is cpu"):
        lanes_on("cpu", 2)


@pytest.mark.parametrize("said", ["0", "-1", "two", "1.5"])
def test_what_is_no_number_of_lanes_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_LANES", said)
    for device in ("cuda", "cpu"):
        with pytest.raises(TunerError, match=f"TUNER_LANES={said}: give a number from 1 up"):
            lanes_on(device)


def test_every_slot_has_its_thread_budget_in_its_environment() -> None:
    (plan,) = plan_slots(cores=6, slots=1)
    assert plan.environment.items() >= {"OMP_NUM_THREADS": "6", "MKL_NUM_THREADS": "6"}.items()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cores": 16}, [("1", "16")] * 16),
        ({"cores": 16, "slots": 3}, [("5", "3")] * 3),
        ({"cores": 2, "slots": 3}, [("1", "3")] * 3),
        ({"cores": 16, "visible": ["0"]}, [("16", "1")]),
        (
            {"cores": 16, "visible": ["0", "1"], "slots_per_gpu": lambda names: [1, 3]},
            [("4", "1"), *[("4", "3")] * 3],
        ),
    ],
)
def test_every_slot_is_told_its_share_of_the_cores_and_who_shares_its_device(
    options: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    told = [plan.environment for plan in plan_slots(**options)]
    assert [(each["TUNER_CORES"], each["TUNER_SLOTS_ON_DEVICE"]) for each in told] == expected


def test_process_that_was_told_no_share_has_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0", "many"):
        monkeypatch.setenv("TUNER_CORES", value)
        monkeypatch.setenv("TUNER_SLOTS_ON_DEVICE", value)
        assert (own_cores(), slots_on_device()) == (usable_cores(), 1)
    monkeypatch.setenv("TUNER_CORES", "3")
    monkeypatch.setenv("TUNER_SLOTS_ON_DEVICE", "2")
    assert (own_cores(), slots_on_device()) == (3, 2)


@pytest.mark.parametrize(
    ("count", "mask", "names"),
    [
        (2, None, ["0", "1"]),
        (0, None, []),
        (2, "3,5", ["3", "5"]),
        (1, "3,17", ["3"]),
        (0, "", []),
        (0, "-1", []),
        (2, "GPU-8932f937, GPU-17aa02cd", ["GPU-8932f937", "GPU-17aa02cd"]),
        (1, "MIG-aa,MIG-bb", ["MIG-aa", "MIG-bb"]),
    ],
)
def test_mask_of_the_environment_is_respected(
    count: int, mask: str | None, names: list[str]
) -> None:
    assert visible_gpus(count, mask) == names


def test_gpu_named_twice_is_one_gpu() -> None:
    assert chosen_gpus("0, 0,GPU-1", ["GPU-1", "GPU-2"]) == ["GPU-1"]


@pytest.mark.parametrize(
    ("per_slot", "total", "cores", "expected"),
    [
        (10 * GIB, 80 * GIB, 64, 7),
        (90 * GIB, 80 * GIB, 64, 1),
        (GIB, 80 * GIB, 64, 16),
        (GIB, 80 * GIB, 4, 4),
    ],
)
def test_slots_fill_nine_tenths_of_a_gpu(
    per_slot: int, total: int, cores: int, expected: int
) -> None:
    assert slots_that_fit(per_slot, total, cores) == expected


def test_tightest_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    limits = {"new": {"cpu.max": "400000 100000"}, "none": {"cpu.max": "max 100000"}}
    limits["old"] = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}
    limits["old without"] = {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}
    folders = {}
    for name, files in limits.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for file, text in files.items():
            (folders[name] / file).write_text(f"{text}\n")
    assert cpu_quota(folders.values()) == 1.5
    assert cpu_quota([folders["new"], folders["none"]]) == 4.0
    assert cpu_quota([folders["none"], folders["old without"], tmp_path / "missing"]) is None


def test_this_machine_has_a_core() -> None:
    assert usable_cores() >= 1
