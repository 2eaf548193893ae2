"""CPU mode: real Megatron-core on CPU tensors and gloo, for machines without a GPU. Installed on request only.

Megatron-core allocates on ``"cuda"``, forks CUDA random states, records CUDA events and asserts CUDA tensor types. In
CPU mode all of
that is answered by the CPU: a `torch.overrides.TorchFunctionMode` rewrites devices in every torch call, and the parts
    of `torch.cuda`
that are not torch calls are replaced. Numbers are real; times and memory figures of `torch.cuda` are not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.integers import integer_of
from dsp_plugin.patches.patch import Patch, PatchSet
from dsp_plugin.patches.post_import import after_import

CPU_MODE = "DSP_PLUGIN_CPU"
"""Environment variable: ``1`` asks for CPU mode, ``force`` also where CUDA is present; unset or ``0`` is off."""

_TORCH = ">=2.6"
_MEGATRON = ">=0.16.1,<0.20"


def requested(flag: str | None) -> str | None:
    """What the user asked for: ``"1"``, ``"force"`` or None.

    Args:
        flag: the value of the launcher's ``--cpu``; None where it was not given, in which case the environment decides.

    Raises:
        UnsupportedError: the value is none of ``1``, ``0``, ``force``.
    """
    value = os.environ.get(CPU_MODE, "0") if flag is None else flag
    if value not in ("", "0", "1", "force"):
        raise UnsupportedError(
            setting="--cpu" if flag is not None else CPU_MODE,
            value=value,
            why="CPU mode is 1 (on), 0 (off) or force (on although CUDA is present)",
            remedy="write --cpu, --cpu=force, or leave it out",
        )
    return value if value in ("1", "force") else None


def install(*, force: bool = False) -> None:
    """Turns CPU mode on for the rest of the process; does nothing where it is on.

    Args:
        force: also where CUDA is present.

    Raises:
        UnsupportedError: CUDA is present and `force` is not set.
        PatchError: this torch does not have what is replaced; nothing is changed.
    """
    patches = torch_patches()
    if patches.applied:
        return
    if torch.cuda.is_available() and not force:
        raise UnsupportedError(
            setting="--cpu",
            value="1",
            why=f"this machine has {torch.cuda.device_count()} CUDA device(s), which CPU mode would leave idle",
            remedy="drop --cpu, or insist with --cpu=force (or DSP_PLUGIN_CPU=force)",
        )
    patches.apply()
    os.environ[CPU_MODE] = "force" if force else "1"
    # Megatron asks for both: its fused functions are compiled unless dynamo is off, and it insists on the second with
    # TP or CP.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
    # Its one message says that the CPU generator moved while the CUDA one was forked; here they are one generator.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_expected)
    CpuDevices().__enter__()
    after_import("megatron.core.datasets.utils", _helpers_patch().apply)
    after_import("megatron.training.initialize", _warm_up_patch().apply)


class CpuDevices(TorchFunctionMode):
    """Answers every torch call that names a CUDA device with the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        if "device" in arguments:
            arguments["device"] = _on_cpu(arguments["device"])
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        if func is torch.Tensor.type:
            return _tensor_type(func, args, arguments)
        # There is no pinned memory without a CUDA driver, and a CPU copy does not need it.
        arguments.pop("pin_memory", None)
        return func(*args, **arguments)


def _tensor_type(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Tensor.type`: clip_grads and the distributed optimizer assert its answer to be a CUDA type's name."""
    if len(args) == 1 and not kwargs:
        name = func(*args)
        return name.replace("torch.", "torch.cuda.", 1) if not name.startswith("torch.cuda.") else name
    wanted = args[1] if len(args) > 1 else kwargs["dtype"]
    if isinstance(wanted, str):
        wanted = wanted.replace("torch.cuda.", "torch.")
    return func(args[0], wanted)


def _on_cpu(device: Any) -> Any:
    if isinstance(device, bool) or device is None:
        return device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return torch.device("cpu")
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


class _Stream:
    """A CUDA stream where work is done when the call returns."""

    device_index = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = torch.device("cpu")

    def _done(self, *args: object, **kwargs: object) -> None:
        """Nothing is ever outstanding."""

    synchronize = wait_event = wait_stream = _done

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        """An event at this point of the stream."""
        event = event or _Event()
        event.record()
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to restore."""


class _Event:
    """A CUDA event on the host's clock."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        """Notes the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        """Whether the event has happened."""
        return True

    def wait(self, stream: object = None) -> None:
        """Nothing is ever outstanding."""

    synchronize = wait


def torch_patches() -> PatchSet:
    """What CPU mode replaces in torch itself."""
    stream = _Stream()
    devices = integer_of("LOCAL_WORLD_SIZE", 1)
    properties = SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count() or 1, warp_size=32
    )
    answers: dict[str, object] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": devices,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "get_device_properties": properties,
        "get_device_capability": (0, 0),
        "get_device_name": "cpu",
        "mem_get_info": (0, 0),
        **dict.fromkeys(
            ("_lazy_init", "init", "set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect")
        ),
        **dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated", "nvtx.range_push", "nvtx.range_pop")),
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "utilization"), 0
        ),
        **dict.fromkeys(("temperature", "power_draw", "clock_rate", "device_memory_used"), 0),
    }
    replaced: dict[str, Callable[[Any], object]] = {
        **{name: _answer(value) for name, value in answers.items()},
        "memory_stats": lambda upstream: lambda device=None: defaultdict(int),
        "Stream": lambda upstream: _Stream,
        "Event": lambda upstream: _Event,
        "stream": lambda upstream: _no_context,
        "device": lambda upstream: _no_context,
        "nvtx.range": lambda upstream: _no_context,
        "default_generators": lambda upstream: (torch.default_generator,) * max(1, devices),
        "manual_seed": lambda upstream: _seed,
        "manual_seed_all": lambda upstream: _seed,
        "get_rng_state": lambda upstream: lambda device="cuda": torch.default_generator.get_state(),
        "set_rng_state": lambda upstream: lambda new_state, device="cuda": _set_state(new_state),
        "random.get_rng_state": lambda upstream: lambda device="cuda": torch.default_generator.get_state(),
        "random.set_rng_state": lambda upstream: lambda new_state, device="cuda": _set_state(new_state),
    }
    cuda = tuple(
        Patch(f"cpu mode: torch.cuda.{name}", f"torch.cuda:{name}", "torch", _TORCH, make)
        for name, make in replaced.items()
    )
    gloo = tuple(
        Patch(f"cpu mode: {name}", f"torch.distributed:{name}", "torch", _TORCH, _over_gloo, ("backend",))
        for name in ("init_process_group", "new_group")
    )
    absent = Patch("cpu mode: torch.accelerator", "torch.accelerator:is_available", "torch", _TORCH, _answer(False))
    engine = Patch("cpu mode: backward", "torch.autograd:_engine_run_backward", "torch", _TORCH, _in_cpu_mode)
    return PatchSet("CPU mode", (*cuda, *gloo, absent, engine))


def _in_cpu_mode(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Backward passes: torch leaves a mode while it handles a call, and a backward pass runs Megatron's code in one."""

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with CpuDevices():
            return upstream(*args, **kwargs)

    return run_backward


def _answer(value: object) -> Callable[[Any], Callable[..., object]]:
    def make(upstream: object) -> Callable[..., object]:
        return lambda *args, **kwargs: value

    return make


@contextlib.contextmanager
def _no_context(*args: object, **kwargs: object) -> Iterator[None]:
    yield


def _expected(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _set_state(state: torch.Tensor) -> None:
    torch.default_generator.set_state(state)


def _over_gloo(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Process groups over gloo whatever backend was asked for, bound to no CUDA device."""

    def create(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        if upstream.__name__ == "init_process_group" and args:
            kwargs["backend"], args = args[0], args[1:]
        if isinstance(kwargs.get("backend"), str) and "nccl" in kwargs["backend"]:
            kwargs["backend"] = dist.Backend.GLOO
        return upstream(*args, **kwargs)

    return create


def _helpers_patch() -> Patch:
    """The wheel ships the compiled dataset helper; building it again would need its sources and make."""
    return Patch(
        "cpu mode: compiled dataset helper",
        "megatron.core.datasets.utils:compile_helpers",
        "megatron-core",
        _MEGATRON,
        _answer(None),
    )


def _warm_up_patch() -> Patch:
    """The warm-up of fused functions draws from the only generator there is here: it would change the weights' init."""
    return Patch(
        "cpu mode: fusion warm-up",
        "megatron.training.initialize:set_jit_fusion_options",
        "megatron-core",
        _MEGATRON,
        _answer(None),
    )
