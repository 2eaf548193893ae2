"""A step of one rank of any world, in one process, without data: its bytes on the wire and its memory.

The process group is torch's fake one, which sends nothing; tensors are torch's fake ones, which have shapes but no
memory. Everything else is what runs for real: the model, its hooks, the methods, autograd. `real_run` is that same
step on spawned ranks, with memory measured by another instrument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from dsp_plugin.comm import wire
from dsp_plugin.comm.ledger import AGREEMENT, Ledger, LedgerRow, ledger
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.planner.stages import StagePlan
from dsp_plugin.plans.plan import matching_modules, outermost
from dsp_plugin.rehearsal.cuda.recorder import Counts, Recorder, site
from dsp_plugin.rehearsal.host import offload_of, watch
from dsp_plugin.rehearsal.memory import (
    AllocatorLog,
    Memory,
    StorageTracker,
    gradients_in,
    memory_of,
    step,
    tensors_in,
)
from dsp_plugin.rehearsal.model_states import units_of
from dsp_plugin.rehearsal.places import ModulePlaces
from dsp_plugin.rehearsal.subject import Library, Subject
from dsp_plugin.rehearsal.timeline import Timeline
from dsp_plugin.sharding.checkpoints import kept
from dsp_plugin.sharding.parallelize import Parallelized, hooked
from dsp_plugin.spawn import spawn
from dsp_plugin.training.offload import in_force

# gloo's threads let go of a collective's buffers when they next get to run: a real run waits `_PAUSE` seconds for them
# after each collective, and takes the least of `_REPEATS` steps.
_PAUSE = 0.01
_REPEATS = 2


@dataclass(frozen=True)
class Job:
    """What to run, dry or for real.

    Attributes:
        build: makes the model and its batch; called with ``dtype`` as torch's default dtype. Importable, to be run on
            spawned ranks.
        config: how to shard it.
        dtype: of weights, and of inputs that the subject makes in the default dtype.
        recompute: glob over module names: what is recomputed in the backward pass; None for nothing.
        backward: whether to run the backward pass, too.
    """

    build: Callable[[], Subject]
    config: SequenceParallelConfig
    dtype: torch.dtype = torch.float32
    recompute: str | None = None
    backward: bool = True


@dataclass(frozen=True)
class RankRun:
    """One step of one rank.

    Attributes:
        rows: the ledger of what leaves this rank.
        memory: of this rank.
        stage_plan: where tokens are sharded; None where no plan is used.
        parameter_count: elements of all parameters.
        units: elements of what stage 3 of ZeRO gathers at a time, see `model_states.units_of`.
        library: which has sharded the model; None where we did.
        timeline: what was allocated by whom; None of a real run, whose allocator does not know.
        gradients: keys in the timeline of the parameters' gradients.
        operators: that a GPU would launch kernels for; None of a real run.
        asked: of a device by the forward and the backward pass; None where tensors were the CPU's.
    """

    rows: tuple[LedgerRow, ...]
    memory: Memory
    stage_plan: StagePlan | None
    parameter_count: int
    units: tuple[int, ...] = ()
    library: Library | None = None
    timeline: Timeline | None = None
    gradients: frozenset[int] = frozenset()
    operators: int | None = None
    asked: tuple[Counts, Counts] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes leaving the rank."""
        return sum(row.bytes for row in self.rows)


def dry_run(job: Job, world_size: int, rank: int = 0, device: Literal["cpu", "cuda"] = "cpu") -> RankRun:
    """Run ``job`` as rank ``rank`` of ``world_size`` would, without data and without other ranks.

    Args:
        job: its model and batch are those of one rank; data-parallel ranks have batches of their own.
        device: whose tensors are faked; ``cuda`` in a `CudaProcess` only.

    Raises:
        SequenceParallelConfigError: the job does not fit the world, or a real world is up in this process.
        UnsupportedError: the method or the model reads values of tensors, which are not there.
    """
    job.config.check_world(world_size)
    with _fake_world(world_size, rank):
        groups = SequenceParallelGroups.build(job.config)
        if groups.sp.debug:
            raise SequenceParallelConfigError(
                setting="debug",
                value=True,
                why="ranks would compare what they are about to send, and a dry run has one",
                remedy="set debug to false, and unset DSP_PLUGIN_DEBUG",
            )
        try:
            with _fake_tensors(), _prepared(job, groups, device) as prepared:
                return _counted(prepared, job, device)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UnsupportedError(
                setting="dry run",
                value=f"{job.config.method} of size {job.config.size}",
                why=f"the step reads values of tensors ({error.func} at {site(error)}), which have none in a dry run",
                remedy="build a model whose control flow does not depend on data, and shard contiguous runs of tokens, "
                "without zigzag or striped layouts; or run for real on a small size",
            ) from error


def _counted(prepared: _Prepared, job: Job, device: str) -> RankRun:
    module, kwargs = prepared.subject[:2]
    places = ModulePlaces(module)
    tracker = StorageTracker(_operator, places)
    watch(in_force(), job.config, tracker)
    recorder = Recorder(places.owner) if device == "cuda" else None
    passes: list[Counts] = []

    def begin(phase: str) -> None:
        tracker.begin(phase)
        if recorder is not None:
            # What was counted before the first phase is of no pass.
            passes.append(recorder.take())

    with places, tracker, ledger() as traffic, nullcontext() if recorder is None else recorder.looking_on():
        step(module, kwargs, job.backward, begin)
    run = _finished(prepared, traffic, memory_of(module, kwargs, tracker))
    if recorder is not None:
        recorder.finish()
        _, *both = [*passes, recorder.take()]
        run = replace(run, asked=(both[0], both[1] if job.backward else Counts()))
    gradients = frozenset(gradients_in(module, tracker))
    return replace(run, timeline=tracker.timeline, gradients=gradients, operators=tracker.operators)


def real_run(job: Job, timeout: float = 120.0, ranks: int | None = None) -> list[RankRun]:
    """Run ``job`` on ranks that are spawned on this machine's CPU; results by rank.

    Memory is what the allocator reports.

    Args:
        timeout: seconds.
        ranks: how many; one sequence group of them when None.

    Raises:
        UnsupportedError: ranks would run on CUDA devices.
        RankFailure: a rank failed.
    """
    ranks = job.config.size if ranks is None else ranks
    if torch.cuda.device_count() >= ranks:
        raise UnsupportedError(
            setting="real run",
            why=f"{torch.cuda.device_count()} CUDA devices are visible, and its allocator log is that of the CPU",
            remedy='hide them: CUDA_VISIBLE_DEVICES=""',
        )
    return spawn(real_rank, ranks, job, timeout=timeout)


def real_rank(job: Job) -> RankRun:
    """Run ``job`` on this rank of the world that is up; every rank must."""
    groups = SequenceParallelGroups.build(job.config)
    traffic, memories = Ledger(), []
    with _prepared(job, groups) as prepared:
        module, kwargs = prepared.subject[:2]
        for repeat in range(_REPEATS):
            module.zero_grad()
            memory_log = AllocatorLog()
            watch(in_force(), job.config, memory_log)
            with memory_log, _unhurried(), ledger(traffic) if repeat == 0 else nullcontext():
                step(module, kwargs, job.backward)
            memories.append(memory_of(module, kwargs, memory_log))
        least = memories[0]._replace(
            activations=min(memory.activations for memory in memories),
            peak=min(memory.peak for memory in memories),
            # Later steps find the buffers of the first.
            host=max(memory.host for memory in memories),
        )
        return _finished(prepared, traffic, least)


class _Prepared(NamedTuple):
    subject: Subject
    handle: Parallelized | None


@contextmanager
def _prepared(job: Job, groups: SequenceParallelGroups, device: str = "cpu") -> Iterator[_Prepared]:
    # What code reads while it builds a model, such as random states, is real also where its tensors are fake.
    there = torch.device(device) if device != "cpu" else nullcontext()
    with _default_dtype(job.dtype), there, StorageTracker(_operator):
        subject = job.build()
    module = subject.module.train()
    handle, ends = None, list[Callable[[], object]]()
    if subject.library is None:
        ends = kept(module, job.config, offload_of(job.config))
        handle = hooked(module, config=job.config, groups=groups)
    if job.recompute is not None:
        for part in outermost(matching_modules(module, job.recompute, "recompute")).values():
            part.forward = _recomputed(part.forward)
    try:
        yield _Prepared(subject, handle)
    finally:
        for end in ends:
            end()
        if subject.library is not None:
            subject.library.close()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Wrapped, since plans name arguments by the signature.
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _finished(prepared: _Prepared, traffic: Ledger, memory: Memory) -> RankRun:
    (module, _, library), handle = prepared
    count = sum(parameter.numel() for parameter in module.parameters())
    # A dry run has nobody to agree with; nor has any real pass but the first.
    rows = tuple(row for row in traffic.rows() if row.method != AGREEMENT)
    plan = None if handle is None else handle.stage_plan
    # Who closes it need not be told apart by who gets the result, on another process maybe.
    told = None if library is None else library._replace(close=_nothing)
    return RankRun(rows, memory, plan, count, units_of(module), told)


def _nothing() -> None:
    """What is closed already."""


@contextmanager
def _unhurried() -> Iterator[None]:
    waiting = wire.waiting

    @contextmanager
    def and_pausing(on_cuda: bool) -> Iterator[None]:
        with waiting(on_cuda):
            yield
        time.sleep(_PAUSE)

    wire.waiting = and_pausing
    try:
        yield
    finally:
        wire.waiting = waiting


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _fake_world(world_size: int, rank: int) -> Iterator[None]:
    # Registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise SequenceParallelConfigError(
            setting="dry run",
            why=f"a process group of {dist.get_world_size()} ranks is up, and a process has one world at a time",
            remedy="run it in a process of its own, not under torchrun",
        )
    if not 0 <= rank < world_size:
        raise SequenceParallelConfigError(
            setting="rank", value=rank, why=f"ranks of this world are 0 to {world_size - 1}", remedy="choose one"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Tensors made inside have no data; the states of random generators, which code compares and restores, do."""
    real = torch.get_rng_state, torch.set_rng_state

    def without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with _disable_current_modes():
                return function(*args)

        return call

    torch.get_rng_state = torch.random.get_rng_state = without_modes(real[0])
    torch.set_rng_state = torch.random.set_rng_state = without_modes(real[1])
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.get_rng_state, torch.set_rng_state = real
        torch.random.get_rng_state, torch.random.set_rng_state = real


def _operator(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.ops.aten.copy_.default and isinstance(args[0], FakeTensor):
        # Of no effect without data; hundreds of ranks are hundreds of these to a switch.
        return args[0]
    tensors = tensors_in((args, kwargs))
    to_device = torch.device(kwargs.get("device") or "cpu").type != "cpu"
    if tensors and not to_device and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
        # The state of a random generator, or a constant that is older than the run.
        with _disable_current_modes():
            return func(*args, **kwargs)
    return func(*args, **kwargs)
