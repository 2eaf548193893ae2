"""The recorder finds each fault that it is there for, in faults made by hand, and counts what is counted by hand."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.wire import Exchange, Sender, Transfers
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.rehearsal.cuda import device, guard
from dsp_plugin.rehearsal.cuda.process import CudaProcess
from dsp_plugin.rehearsal.cuda.recorder import Counts, Recorder, recording

pytestmark = pytest.mark.timeout(300)


def counted(act: Callable[[torch.Tensor], object]) -> Counts:
    """What a function of a CUDA tensor ``[4, 8]`` of fp32 costs; values that nobody knows end it."""
    with recording() as recorder:
        x = torch.empty(4, 8, device="cuda", requires_grad=True)
        recorder.take()
        try:
            act(x)
        except torch._subclasses.fake_tensor.DataDependentOutputException:
            pass
        except torch._subclasses.fake_tensor.DynamicOutputShapeException:
            pass
        return recorder.take()


def item(x: torch.Tensor) -> None:
    x.sum().item()


def truth(x: torch.Tensor) -> None:
    bool(x.sum() > 0)


def listed(x: torch.Tensor) -> None:
    x.tolist()


def nonzero(x: torch.Tensor) -> None:
    torch.nonzero(x)


def masked(x: torch.Tensor) -> None:
    x[x > 0]


def to_host(x: torch.Tensor) -> None:
    x.cpu()


def copied_to_host(x: torch.Tensor) -> None:
    torch.empty(4, 8).copy_(x)


def synchronized(x: torch.Tensor) -> None:
    torch.cuda.synchronize()


def event_waited_for(x: torch.Tensor) -> None:
    event = torch.Event("cuda")
    event.record()
    event.synchronize()


@pytest.mark.parametrize(
    "act",
    [item, truth, listed, nonzero, masked, to_host, copied_to_host, synchronized, event_waited_for],
    ids=lambda act: act.__name__,
)
def test_a_wait_of_the_host_is_found(worker: CudaProcess, act: Callable[[torch.Tensor], None]) -> None:
    assert len(worker.run(counted, act).syncs) == 1


def to_host_without_waiting(x: torch.Tensor) -> None:
    x.to("cpu", non_blocking=True)
    torch.empty(4, 8).copy_(x, non_blocking=True)


def test_a_copy_that_nobody_waits_for_is_none(worker: CudaProcess) -> None:
    assert not worker.run(counted, to_host_without_waiting).syncs


def beside(x: torch.Tensor) -> None:
    torch.where(x > 0, x, torch.zeros(()))
    x[torch.zeros(2, dtype=torch.int64)]


def test_a_cpu_tensor_beside_cuda_ones_is_found_unless_it_is_a_number(worker: CudaProcess) -> None:
    (mixed,) = worker.run(counted, beside).mixed
    assert mixed.startswith("index at")


def from_lists(x: torch.Tensor) -> None:
    torch.tensor([1.0, 2.0], device="cuda")
    x.new_tensor([1, 2])
    torch.as_tensor([1, 2], device="cuda")


def test_tensors_made_from_lists_are_found(worker: CudaProcess) -> None:
    found = worker.run(counted, from_lists)
    assert len(found.made) == len(found.uploads) == 3


def look_up(x: torch.Tensor) -> None:
    importlib.metadata.version("torch")


def test_a_look_at_the_metadata_of_a_package_is_found(worker: CudaProcess) -> None:
    assert worker.run(counted, look_up).lookups == 1


def two_launches(x: torch.Tensor) -> None:
    y = x.detach().transpose(0, 1)[:4].expand(4, 4)
    y = torch.add(y, 1)
    torch.empty_like(y).copy_(y)
    torch.zeros(0, device="cuda")


def test_views_and_allocations_are_no_launches_and_traffic_is_what_is_read_and_written(worker: CudaProcess) -> None:
    found = worker.run(counted, two_launches)
    assert found.kernels == {"add": 1, "copy_": 1}
    assert found.traffic == 4 * 4 * 4 * 4


def threads_of_backward(x: torch.Tensor) -> None:
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(threading.get_ident())
            return grad.clone()

    Seen.apply(x).sum().backward()
    assert seen
    assert seen != [threading.get_ident()]


def test_backward_passes_run_on_the_device_s_own_thread_and_are_counted(worker: CudaProcess) -> None:
    assert worker.run(counted, threads_of_backward).kernels["clone"] == 2


# --- buffers of transfers


def sent(act: Callable[[Recorder], object]) -> Counts:
    """What is found of something that sends, on rank 0 of 2."""
    with device.rank_of(0, 2), recording() as recorder:
        act(recorder)
        recorder.finish()
        return recorder.take()


def sender() -> Sender:
    return Sender(Axis.of_group("sp", torch.distributed.group.WORLD), "test", "forward")


def exchange() -> tuple[Exchange, torch.Tensor, torch.Tensor]:
    buffer, received = torch.empty(8, device="cuda"), torch.empty(8, device="cuda")
    return Exchange(buffer, received, [4, 4], [4, 4], sender(), []), buffer, received


def written_in_flight(recorder: Recorder) -> None:
    pending, buffer, _ = exchange()
    buffer[2:].zero_()
    pending.wait()


def read_in_flight(recorder: Recorder) -> None:
    pending, _, received = exchange()
    torch.add(received, 1)
    pending.wait()


def never_waited_for(recorder: Recorder) -> None:
    exchange()


def received_twice_in_one_place(recorder: Recorder) -> None:
    _, _, received = exchange()
    Exchange(torch.empty(8, device="cuda"), received, [4, 4], [4, 4], sender(), []).wait()


def read_after_the_wait(recorder: Recorder) -> None:
    pending, buffer, received = exchange()
    torch.add(buffer, 1)
    pending.wait()
    torch.add(received, 1)
    buffer.zero_()


def waited_for_on_another_stream(recorder: Recorder) -> None:
    transfers = Transfers({1: torch.empty(8, device="cuda")}, {1: 8}, torch.empty(0, device="cuda"), "test", sender())
    with torch.Stream(device="cuda"):
        transfers.wait()


def waited_for_on_another_stream_that_is_told(recorder: Recorder) -> None:
    pending, _, _ = exchange()
    with torch.Stream(device="cuda"):
        pending.wait()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (written_in_flight, "zero_ writes what is in flight"),
        (read_in_flight, "add reads what has not arrived"),
        (never_waited_for, "never waited for"),
        (received_twice_in_one_place, "shares memory"),
        (waited_for_on_another_stream, "freed, and stream"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_buffer_that_nccl_still_has_is_found(worker: CudaProcess, act: Callable[[Recorder], None], said: str) -> None:
    assert any(said in fault for fault in worker.run(sent, act).faults)


@pytest.mark.parametrize(
    "act", [read_after_the_wait, waited_for_on_another_stream_that_is_told], ids=lambda act: act.__name__
)
def test_buffers_that_are_left_alone_have_no_fault(worker: CudaProcess, act: Callable[[Recorder], None]) -> None:
    found = worker.run(sent, act)
    assert not found.faults
    assert [posted.kind for posted in found.posted] == ["all_to_all", "wait"]
    assert found.posted[0].sends == ((0, 16), (1, 16))


# --- the build


def test_a_build_that_is_killed_leaves_nothing_that_the_next_would_wait_for(tmp_path: Path) -> None:
    script = f"import runpy; print(runpy.run_path({guard.__file__!r})['built']())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexec sleep 10\n")
    compiler.chmod(0o755)
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", script], env={**environment, "CXX": str(compiler)}, timeout=3)
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n')
    done = subprocess.run([sys.executable, "-c", script], env={**environment, "CXX": str(compiler)}, timeout=60)
    assert done.returncode == 0
    assert [path.read_text() for path in (tmp_path / "dsp_plugin").glob("*.so")] == ["built\n"]


def test_what_the_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="no such header"):
        guard.built()


# --- the process


def unlike_any() -> None:
    raise UnsupportedError(setting="here", why="it cannot be", remedy="leave it")


def silent() -> None:
    os._exit(7)


def test_what_is_raised_there_is_raised_here_with_its_traceback(worker: CudaProcess) -> None:
    with pytest.raises(UnsupportedError, match="it cannot be") as raised:
        worker.run(unlike_any)
    assert "in unlike_any" in raised.value.__notes__[0]


def test_a_process_that_dies_is_said_to_and_the_next_call_has_a_new_one() -> None:
    own = CudaProcess()
    with pytest.raises(RuntimeError, match="died in silent: status 7"):
        own.run(silent)
    assert own.run(os.getpid) != os.getpid()
    with pytest.raises(TimeoutError, match="sleep has not returned in 1 seconds"):
        own.run(time.sleep, 60, timeout=1.0)
    own.stop()
