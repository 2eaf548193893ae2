"""What holds for a stretch of a forward pass, and has to hold again where a checkpoint runs part of that stretch again.

Activation checkpointing runs a function again in the backward pass, after every hook and context around its first run
has ended. So what gives calls their meaning for a while (which pass this is, where its tokens lie, which module's
attention is routed) is an *extent*: a checkpoint made inside takes along the extents in force, and enters them anew
whenever it runs its function again. `dsp_plugin.patches.recompute` puts `entering_again` into the checkpoints we know.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from dsp_plugin.errors import UnsupportedError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
State = TypeVar("State")
Value = TypeVar("Value")
Enter = Callable[[], AbstractContextManager[Value]]


class _Local(threading.local):
    """Of each thread: on CUDA, backward passes run in threads of their own."""

    def __init__(self) -> None:
        self.extents: list[Enter[object]] = []
        self.first_runs = 0
        self.known = 0
        self.noting: list[list[Enter[object]]] = []


_local = _Local()


@contextmanager
def extent(enter: Enter[Value]) -> Iterator[Value]:
    """Enter what ``enter`` makes, and have checkpoints that are made inside enter what it makes again."""
    with enter() as value:
        _local.extents.append(enter)
        try:
            yield value
        finally:
            # The last of its kind, not the last of all: hooks of nested modules may end in any order.
            _local.extents.reverse()
            _local.extents.remove(enter)
            _local.extents.reverse()


@contextmanager
def noting(begun: list[Enter[object]]) -> Iterator[None]:
    """Add to ``begun`` the passes of parts that begin inside, see `Running.begin_part`."""
    _local.noting.append(begun)
    try:
        yield
    finally:
        _local.noting[:] = [other for other in _local.noting if other is not begun]


def entering_again(
    function: Callable[Arguments, Result], *, runs_first: bool, begun: list[Enter[object]] | None = None
) -> Callable[Arguments, Result]:
    """``function`` that enters the extents in force now, for who runs it again when they have ended.

    Args:
        runs_first: whether its first call is made where the extents are in force still.
        begun: what its first run notes, if that is not by this function.
    """
    held = tuple(_local.extents)
    inside: list[Enter[object]] = [] if begun is None else begun
    # What is made in a backward pass may be part of what a checkpoint of a kind that we do not know runs again.
    known = not in_backward() or _local.known > 0
    if not held and not known:
        return function
    first = runs_first

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal first
        if first:
            first = False
            _local.first_runs += 1
            try:
                with noting(inside):
                    return function(*args, **kwargs)
            finally:
                _local.first_runs -= 1
        _local.known += known
        try:
            with ExitStack() as stack:
                for enter in (*held, *inside):
                    stack.enter_context(extent(enter))
                return function(*args, **kwargs)
        finally:
            _local.known -= known

    return run


def in_first_run() -> bool:
    """Whether a checkpoint that will enter the extents again runs its function for the first time."""
    return _local.first_runs > 0


def in_backward() -> bool:
    """Whether this thread is in a backward pass: a forward that runs now is run again, as a rule."""
    return bool(torch._C._current_graph_task_id() != -1)


def in_unknown_rerun() -> bool:
    """Whether this thread is in a backward pass, and within no checkpoint that enters the extents again.

    A forward that runs now is run again by a checkpoint of a kind that we do not know.
    """
    return in_backward() and _local.known == 0


class Running(Generic[State]):
    """The state of the forward pass that runs, for what is called inside of it; none outside of passes.

    It is in force from `begin` to `end`, and again while a checkpoint made in between is run again. For checkpoints of
    kinds that we do not know, `recall_by` brings it back when the backward pass of the forward pass's output starts,
    until that ends.

    Args:
        again: made and entered around whatever is run again, of the state.
    """

    def __init__(self, again: Callable[[State], AbstractContextManager[object]] | None = None) -> None:
        self._again = again
        self._in_force: list[tuple[State, bool]] = []
        self._begun: list[tuple[State, ExitStack]] = []
        self._recalled: Callable[[], _Recalled[State] | None] = lambda: None
        self._closed = False

    @property
    def now(self) -> State | None:
        """The state; None outside of passes."""
        if self._in_force:
            return self._in_force[-1][0]
        recalled = self._recalled() if in_unknown_rerun() else None
        return None if recalled is None else recalled.state

    @property
    def again(self) -> bool:
        """Whether a part of the pass is run again."""
        return self._in_force[-1][1] if self._in_force else self.now is not None

    def begin(self, state: State) -> None:
        """A forward pass starts."""
        self._start(_First(self, state, again=False))

    def begin_part(self, state: State, *, again: bool) -> None:
        """A part of a pass starts, which others may go on with when this one has ended.

        A checkpoint around it enters ``state`` when it runs the part again.

        Args:
            again: whether it is run again, by who has not entered its state.
        """
        enter = _First(self, state, again)
        for begun in _local.noting:
            if not any(isinstance(other, _First) and other.state is state for other in begun):
                begun.append(enter)
        self._start(enter)

    def end_part(self, state: State) -> bool:
        """It ends; False where what is in force was not begun with it."""
        if not self._begun or self._begun[-1][0] is not state:
            return False
        self.end()
        return True

    def _start(self, enter: _First[State]) -> None:
        stack = ExitStack()
        stack.enter_context(extent(enter))
        self._begun.append((enter.state, stack))

    def end(self) -> None:
        """It is over, or was never begun."""
        if self._begun:
            self._begun.pop()[1].close()

    @property
    def begun(self) -> int:
        """How many passes, one inside the other, have begun and not ended."""
        return len(self._begun)

    def recall_by(self, outputs: Iterable[Tensor], state: State) -> None:
        """Bring ``state`` back while the backward pass of any of ``outputs`` runs."""

        def recall(_: Tensor) -> None:
            before = self._recalled()
            if before is not None:
                before()
            recalled = _Recalled(state)
            if self._again is not None:
                recalled.around.enter_context(self._again(state))
            # Autograd's engine alone holds it, and drops it where the backward pass raises, too.
            self._recalled = weakref.ref(recalled)
            weakref.finalize(recalled, recalled.around.close)
            torch.autograd.Variable._execution_engine.queue_callback(recalled)

        for output in outputs:
            # A leaf outlives the pass, and would gather hooks.
            if output.grad_fn is not None:
                output.register_hook(recall)

    def close(self) -> None:
        """No part of a pass can be run again any more: what served it is gone."""
        self._closed = True

    def check_open(self) -> None:
        """Refuse to run a part of a pass again.

        Raises:
            UnsupportedError: it is closed.
        """
        if self._closed:
            raise UnsupportedError(
                setting="remove() between forward and backward",
                why="a checkpoint runs a part of the forward pass again, and without the hooks its attention would see "
                "this rank's tokens only",
                remedy="call remove() after the backward pass",
            )

    @contextmanager
    def hold(self, state: State, again: bool) -> Iterator[None]:
        """The state in force inside."""
        with ExitStack() as stack:
            self._in_force.append((state, again))
            stack.callback(self._in_force.pop)
            if again and self._again is not None:
                stack.enter_context(self._again(state))
            yield


class _Recalled(Generic[State]):
    """A state that was brought back, until it is called."""

    def __init__(self, state: State) -> None:
        self.state, self.around = state, ExitStack()

    def __call__(self) -> None:
        self.around.close()


class _First(Generic[State]):
    """Enters a state: the first time as that of a pass that begins, later as that of one whose parts run again."""

    def __init__(self, running: Running[State], state: State, again: bool) -> None:
        self.state = state
        self._running, self._entered = running, again

    def __call__(self) -> AbstractContextManager[None]:
        again, self._entered = self._entered, True
        if again:
            self._running.check_open()
        return self._running.hold(self.state, again)
