"""DeepSpeed's batch size rules, with replicas in place of ranks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.patches.deepspeed.batch import refuse_illegal_sizes

COUNT = st.integers(1, 6)
NAMES = ("train", "micro", "accumulation")


@given(size=COUNT, replicas=COUNT, micro=COUNT, accumulation=COUNT, given_sizes=st.sets(st.sampled_from(NAMES)))
def test_consistent_sizes_are_accepted_however_many_are_given(
    size: int, replicas: int, micro: int, accumulation: int, given_sizes: set[str]
) -> None:
    """All that DeepSpeed can complete to train = micro * accumulation * replicas."""
    sizes = {"train": micro * accumulation * replicas, "micro": micro, "accumulation": accumulation}
    sizes = {name: value if name in given_sizes else None for name, value in sizes.items()}
    if given_sizes <= {"accumulation"}:
        with pytest.raises(SequenceParallelConfigError, match="neither train_batch_size nor"):
            refuse_illegal_sizes(**sizes, world_size=size * replicas, size=size)
    else:
        refuse_illegal_sizes(**sizes, world_size=size * replicas, size=size)


@given(size=COUNT, replicas=COUNT, train=st.integers(1, 60), micro=COUNT, accumulation=COUNT)
def test_only_products_are_accepted(size: int, replicas: int, train: int, micro: int, accumulation: int) -> None:
    """Refused exactly where no whole numbers complete the rule."""
    world = size * replicas
    for sizes, legal in (
        ({"micro": micro, "accumulation": accumulation}, train == micro * accumulation * replicas),
        ({"micro": micro, "accumulation": None}, train % (micro * replicas) == 0),
        ({"micro": None, "accumulation": accumulation}, train % (accumulation * replicas) == 0),
        ({"micro": None, "accumulation": None}, train % replicas == 0),
    ):
        if legal:
            refuse_illegal_sizes(train=train, **sizes, world_size=world, size=size)
        else:
            with pytest.raises(SequenceParallelConfigError, match=f"train_batch_size={train}: .* Set train_batch_size"):
                refuse_illegal_sizes(train=train, **sizes, world_size=world, size=size)


@pytest.mark.parametrize("value", [0, -1, 1.5, "auto", True])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    """The message names the setting as it stands in the JSON."""
    setting = {"train": "train_batch_size", "micro": "train_micro_batch_size_per_gpu"}.get(
        name, "gradient_accumulation_steps"
    )
    sizes = {**dict.fromkeys(NAMES, 2), name: value}
    with pytest.raises(SequenceParallelConfigError, match=f"{setting}={value!r}: it is not a positive integer"):
        refuse_illegal_sizes(**sizes, world_size=2, size=2)


def test_the_remedy_is_legal() -> None:
    """Following the message helps."""
    with pytest.raises(SequenceParallelConfigError, match=r"such as 12\.$"):
        refuse_illegal_sizes(train=13, micro=2, accumulation=None, world_size=6, size=3)
    refuse_illegal_sizes(train=12, micro=2, accumulation=None, world_size=6, size=3)
