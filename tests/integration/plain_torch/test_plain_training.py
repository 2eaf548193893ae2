"""DDP and FSDP2 over all ranks train as one rank does: losses, clipped norms and weights, by batch, plan and model."""

from __future__ import annotations

import re

import pytest
from plain_models import KINDS
from plain_refused import WRONG, heard
from torch_training import Case, errors

from dsp_plugin.spawn import spawn

# One optimizer step of bf16 moves weights by as much as it rounds.
BF16 = 3e-2
COVERING = {
    2: [
        Case("batch", "ring", 2, "ddp", unused=True),
        Case("plan", "dsp", 2, "fsdp", checkpointed=True),
        Case("llama", "ulysses", 2, "fsdp first", tile=3),
        Case("tiled", "ring", 2, "fsdp", checkpointed=True),
    ],
    4: [
        Case("batch", "usp", 4, "hsdp", accumulate=2),
        Case("plan", "dsp", 2, "ddp first", accumulate=2),
        Case("llama", "ring", 2, "fsdp", checkpointed=True),
        Case("llama", "usp", 4, "fsdp", reshard=False),
    ],
}
OTHERS = {
    2: [
        *(Case("batch", "ulysses", 2, wrap) for wrap in ("ddp", "ddp first", "fsdp", "fsdp first")),
        *(Case("llama", method, 2, "ddp", checkpointed=True) for method in ("ring", "ulysses")),
        Case("llama", "ulysses", 2, "fsdp first"),
        *(Case("llama", "ring", 2, wrap, accumulate=2, tile=4) for wrap in ("ddp", "fsdp")),
        Case("llama", "ring", 2, "fsdp", bf16=True, tile=4),
        *(Case("llama", method, 2, "ddp first", accumulate=2) for method in ("ring", "lightseq")),
        *(Case("plan", "dsp", 2, wrap) for wrap in ("ddp", "fsdp first")),
        Case("batch", "ring", 2, "fsdp", accumulate=2, checkpointed=True),
        *(Case(kind, method, 2, "fsdp", bf16=True) for kind, method in (("batch", "ring"), ("llama", "ulysses"))),
        *(Case("tiled", "ring", 2, wrap, accumulate=2) for wrap in ("ddp", "fsdp first")),
        *(Case("tiled", "ulysses", 2, wrap, checkpointed=True) for wrap in ("ddp first", "fsdp first")),
        Case("tiled", "ring", 2, "fsdp", bf16=True),
    ],
    4: [
        *(Case("batch", method, 4, wrap) for method in ("ring", "ulysses", "usp") for wrap in ("ddp", "fsdp")),
        *(Case("batch", "ring", 2, wrap) for wrap in ("ddp first", "fsdp first", "hsdp first")),
        *(Case("llama", method, 4, wrap) for method in ("ring", "ulysses", "usp") for wrap in ("ddp", "fsdp first")),
        *(Case("llama", "ulysses", 2, wrap, accumulate=2) for wrap in ("ddp", "hsdp")),
        *(Case("plan", "dsp", size, "fsdp", checkpointed=True) for size in (2, 4)),
        Case("plan", "dsp", 4, "hsdp first", checkpointed=True),
        Case("llama", "ring", 2, "fsdp", bf16=True),
    ],
}


def _check(world: int, cases: list[Case]) -> None:
    for found in spawn(errors, world, cases, timeout=280):
        for case in cases:
            limit = BF16 if case.bf16 else KINDS[case.kind].tolerance
            assert all(error < limit for error in found[str(case)].values()), (str(case), found[str(case)])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, 4])
def test_training_equals_the_run_of_one_rank(world: int) -> None:
    _check(world, COVERING[world])


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [2, 4])
def test_training_equals_the_run_of_one_rank_in_every_other_way(world: int) -> None:
    _check(world, OTHERS[world])


@pytest.mark.timeout(300)
def test_what_would_train_wrongly_is_refused_alike_on_every_rank() -> None:
    """The right ways beside the wrong ones run: `plain_refused.RIGHT`."""
    of_ranks = spawn(heard, 4, timeout=280)
    for name, (_, pattern) in WRONG.items():
        for words in (found[name] for found in of_ranks):
            assert re.search(pattern, words), f"{name}: {words}"
        assert len({found[name].partition(":")[0] for found in of_ranks}) == 1, name
