"""Stages that somebody calls by themselves, one after the other, behind the back of the model that they are of."""

from __future__ import annotations

from typing import Any

from dsp_plugin.plans.plan import Plan
from dsp_plugin.sharding.outputs import all_tensors
from dsp_plugin.sharding.passes import RegionPass
from dsp_plugin.training.extents import Running, in_backward


class StagesAlone:
    """Their passes: tokens stay sharded from the first stage to the last, and what is called in between is outside.

    Each stage is an extent of its own, which has the state of its pass in force.

    Args:
        passes: of the region, to which these are added.
        stages: how many there are.
    """

    def __init__(self, passes: Running[RegionPass], plan: Plan, stages: int) -> None:
        self._passes, self._plan, self._stages = passes, plan, stages
        # The last, for stages that go on with it, or that somebody runs again who is no checkpoint that we know.
        self._last: RegionPass | None = None

    def start(self, index: int) -> None:
        """A stage starts. A pass starts with the first, where nothing else is around it."""
        if self._passes.now is not None:
            return
        again, last = in_backward(), self._last
        if not again and (last is None or index == 0 or last.last_run in (None, last.running[-1])):
            last = self._last = RegionPass(list(range(self._stages)), dict(self._plan.sizes))
        if last is not None:
            self._passes.begin_part(last, again=again)

    def end(self, output: Any) -> None:
        """A stage ends, if it was alone."""
        state = self._passes.now
        if state is not None and state.root is None and self._passes.end_part(state) and not in_backward():
            self._passes.recall_by(all_tensors(output), state)
