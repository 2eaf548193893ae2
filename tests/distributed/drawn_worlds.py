"""Drawn workloads: several cases run in one world of spawned processes, because a world costs more than a case.

Draws are the same in every run; a failure shrinks to one case in most runs, and its message has the case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dsp_plugin.spawn import spawn
from dsp_plugin.verification import Case, CaseResult, run_cases


def worlds(cases: Callable[[int], st.SearchStrategy[Case]]) -> st.SearchStrategy[list[Case]]:
    """Cases of one size, from the strategy that `cases` has for it."""
    return st.sampled_from([2, 3, 4]).flatmap(lambda size: st.lists(cases(size), min_size=1, max_size=16))


def run_world(world: list[Case]) -> list[tuple[Case, CaseResult]]:
    """Each case with what its world found."""
    return list(zip(world, spawn(run_cases, world[0].size, world, timeout=100)[0], strict=True))


def shown(case: Case) -> str:
    """Python that makes the case again."""
    values = (f"{field.name}={getattr(case, field.name)!r}" for field in fields(case))
    return f"Case({', '.join(values)})"


def examples(most: int) -> settings:
    """So many worlds."""
    return settings(
        max_examples=most,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
