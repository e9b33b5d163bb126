"""What the pretended device must refuse, and what it must let pass; run by ``test_pretended``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretended._memory import MisuseError

GPU = "cuda"

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    """No test waits for what another one left."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def captured(stream: Any, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            step()
        finally:
            graph.capture_end()
    return graph


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=GPU) + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, 3).gather(0, torch.zeros(1, 3, dtype=torch.int64, device=GPU))
    assert (torch.ones(3, device=GPU) + torch.tensor(1.0)).tolist() == [2.0] * 3


def test_generator_of_the_host_is_refused() -> None:
    with pytest.raises(TypeError, match="generator"):
        torch.ones(3, device=GPU).normal_(generator=torch.Generator())


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x.any()),
    "copy": lambda x: x.cpu(),
    "list": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "indices of the host": lambda x: x[torch.tensor([0, 1])],
    "nonzero": torch.nonzero,
    "numbers of the host": lambda x: x.copy_(torch.zeros(3)),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_waiting_is_refused_where_it_is_forbidden(
    wait: Callable[[Tensor], Any], no_waiting: None
) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait(torch.ones(3, device=GPU))


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_waiting_within_a_graph_is_refused(wait: Callable[[Tensor], Any], stream: Any) -> None:
    numbers = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError, match="captur"):
        captured(stream, lambda: wait(numbers))


@pytest.mark.usefixtures("no_waiting")
def test_training_step_waits_for_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model.to(GPU, non_blocking=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    weight = next(model.parameters())
    before = weight.detach().clone()
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(torch.ones(5, 1, 8, 8, device=GPU))
    logits.float().square().sum().backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert logits.dtype == torch.bfloat16
    assert not torch.equal(before, weight)


def test_graph_replays_operations_and_not_the_code(stream: Any) -> None:
    total, factor = torch.zeros(3, device=GPU), 2.0
    numbers = torch.ones(3, device=GPU)
    graph = captured(stream, lambda: total.add_(numbers * factor))  # type: ignore[arg-type]
    torch.cuda.synchronize()
    assert total.tolist() == [0.0] * 3, "nothing is computed while it is captured"
    factor = 5.0
    numbers.fill_(2.0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.replay()
        graph.replay()
    torch.cuda.synchronize()
    assert total.tolist() == [8.0] * 3, "memory is read anew, the number of the host is not"


def test_graph_draws_on_from_its_generator(stream: Any) -> None:
    numbers = torch.zeros(4, device=GPU)
    graph = captured(stream, lambda: numbers.uniform_())  # type: ignore[arg-type]
    found = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        found.append(numbers.tolist())
    assert found[0] != found[1]


def test_what_another_stream_writes_has_to_be_waited_for(stream: Any) -> None:
    numbers = torch.ones(3, device=GPU)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        numbers.mul_(2.0)
    with pytest.raises(MisuseError, match=r"reads .* nobody waited for: .*mul.* writes"):
        numbers + 1.0
    torch.cuda.current_stream().wait_stream(stream)
    assert (numbers + 1.0).tolist() == [3.0] * 3


def test_event_is_waited_for_and_what_came_after_it_is_not(stream: Any) -> None:
    first, second = torch.ones(3, device=GPU), torch.ones(3, device=GPU)
    stream.wait_stream(torch.cuda.current_stream())
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        first.mul_(2.0)
        event.record()
        second.mul_(2.0)
    event.synchronize()
    assert (first + 1.0).sum().item() == 9.0
    with pytest.raises(MisuseError):
        second + 1.0


def test_bytes_that_do_not_change_are_not_waited_for(stream: Any) -> None:
    rows = torch.ones(4, 3, device=GPU)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rows[1].mul_(2.0)
        rows[2:].mul_(1.0)
    assert (rows[0] + rows[3]).sum().item() == 6.0
    with pytest.raises(MisuseError):
        rows[1] + 1.0


def test_memory_given_back_too_early_is_found(stream: Any) -> None:
    numbers = torch.ones(3, device=GPU)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = numbers + 1.0
    del numbers
    with pytest.raises(MisuseError, match="given out again"):
        torch.zeros(3, device=GPU)
    numbers = torch.ones(3, device=GPU)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = numbers + 1.0
    numbers.record_stream(stream)
    del numbers
    torch.zeros(3, device=GPU)
    torch.cuda.synchronize()
    assert result.tolist() == [2.0] * 3


def test_data_that_are_replaced_give_their_memory_back(stream: Any) -> None:
    weight = nn.Parameter(torch.ones(3, device=GPU))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = weight.detach() + 1.0
    weight.data = torch.zeros(3, device=GPU)
    with pytest.raises(MisuseError, match="given out again"):
        torch.zeros(3, device=GPU)
    torch.cuda.synchronize()
    assert result.tolist() == [2.0] * 3
    assert weight.tolist() == [0.0] * 3
