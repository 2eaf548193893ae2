"""Samplers, streams and packing: batches are those of one rank at any sharding, and a restart goes on with them."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from dsp_plugin import (
    Axis,
    PackedDocuments,
    SequenceParallelBatchSampler,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    SequenceParallelStream,
)
from dsp_plugin.mask import MaskSpec


def replica(rank: int, size: int) -> SequenceParallelGroups:
    """The groups of a rank of replica `rank` of `size`; nothing of them is used to communicate."""
    dp = Axis("dp", object() if size > 1 else None, rank, size, tuple(range(size)))  # type: ignore[arg-type]
    return replace(SequenceParallelGroups.single(), dp=dp)


def steps(make: Any, replicas: int, global_batch: int, micro: int, count: int) -> list[list[int]]:
    """The first global batches, as all replicas together read them in micro steps."""
    micro_steps = global_batch // (micro * replicas)
    readers = [endless(make(replica(rank, replicas))) for rank in range(replicas)]
    return [
        list(chain.from_iterable(next(reader) for _ in range(micro_steps) for reader in readers)) for _ in range(count)
    ]


def endless(sampler: Any) -> Any:
    while True:
        yield from sampler


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, other=SIZES, samples=st.integers(1, 40), shuffle=st.booleans(), done=st.integers(0, 6))
def test_a_global_batch_depends_on_neither_sharding_nor_restart(
    sizes: tuple, other: tuple, samples: int, shuffle: bool, done: int
) -> None:
    (replicas, micro, _), (other_replicas, other_micro, _) = sizes, other
    global_batch = replicas * micro * other_replicas * other_micro

    def sampler(groups: Any, micro_size: int, trained: int = 0) -> SequenceParallelBatchSampler:
        return SequenceParallelBatchSampler(
            samples,
            global_batch_size=global_batch,
            micro_batch_size=micro_size,
            groups=groups,
            shuffle=shuffle,
            seed=5,
            trained=trained,
        )

    whole = steps(lambda groups: sampler(groups, global_batch), 1, global_batch, global_batch, 10)
    assert steps(lambda groups: sampler(groups, micro), replicas, global_batch, micro, 10) == whole
    resumed = steps(
        lambda groups: sampler(groups, other_micro, done * global_batch),
        other_replicas,
        global_batch,
        other_micro,
        10 - done,
    )
    assert resumed == whole[done:]


@pytest.mark.parametrize(("samples", "global_batch"), [(12, 4), (13, 4), (3, 4), (9, 2)])
def test_every_sample_comes_once_an_epoch(samples: int, global_batch: int) -> None:
    sampler = SequenceParallelBatchSampler(samples, global_batch_size=global_batch, micro_batch_size=1, seed=3)
    order = [batch[0] for batch in islice(endless(sampler), 3 * samples)]
    epochs = [order[first : first + samples] for first in range(0, len(order), samples)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(samples))] * 3
    assert samples < 5 or epochs[0] != epochs[1]


def test_passes_end_with_the_epoch_and_know_their_length() -> None:
    for drop_last, lengths in ((False, [4, 3, 3, 3, 4]), (True, [3, 3, 3, 3, 3])):
        sampler = SequenceParallelBatchSampler(13, global_batch_size=4, micro_batch_size=4, drop_last=drop_last)
        for length in lengths:
            assert len(sampler) == length
            assert len(list(sampler)) == length


def test_another_seed_is_another_order() -> None:
    orders = [
        list(SequenceParallelBatchSampler(50, global_batch_size=50, micro_batch_size=50, seed=seed)) for seed in (1, 2)
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"global_batch_size": 6, "micro_batch_size": 2}, ["global_batch_size=6", "2 * 2 = 4", "multiple of 4"]),
        ({"global_batch_size": 4, "micro_batch_size": 2, "trained": 6}, ["trained=6", "6 mod 4 = 2"]),
        ({"global_batch_size": 20, "micro_batch_size": 2, "drop_last": True}, ["samples=10", "fills no"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict, words: list[str]) -> None:
    with pytest.raises(SequenceParallelConfigError) as refused:
        SequenceParallelBatchSampler(10, groups=replica(0, 2), **settings)
    assert all(word in str(refused.value) for word in words), refused.value


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_do_not_change_the_order(workers: int) -> None:
    plain = SequenceParallelBatchSampler(23, global_batch_size=4, micro_batch_size=2, groups=replica(1, 2))
    sampler = SequenceParallelBatchSampler(23, global_batch_size=4, micro_batch_size=2, groups=replica(1, 2))
    loader = DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    for _ in range(3):
        assert [batch.tolist() for batch in loader] == list(plain)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trained", [0, 6])
def test_a_stream_is_shared_out_in_order_by_replicas_and_workers(workers: int, trained: int) -> None:
    """Steps of 6 samples of a source of 20, which begins again."""
    read: list[list[int]] = [[] for _ in range(5)]
    for rank in range(2):
        stream = SequenceParallelStream(
            range(20), global_batch_size=6, micro_batch_size=1, groups=replica(rank, 2), trained=trained
        )
        for number, batch in enumerate(islice(DataLoader(stream, batch_size=1, num_workers=workers), 15)):
            read[number // 3] += batch.tolist()
    order = [place % 20 for place in range(trained, trained + 30)]
    assert [sorted(step) for step in read] == [sorted(order[first : first + 6]) for first in range(0, 30, 6)]


def test_a_stream_of_nothing_ends() -> None:
    assert list(SequenceParallelStream([], global_batch_size=2, micro_batch_size=1)) == []


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), length=st.integers(1, 10))
def test_packed_rows_hold_every_token_with_its_own_documents_next(lengths: list[int], length: int) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    documents = [torch.randint(1000, (count,), generator=generator) for count in lengths]
    stream = torch.cat(documents).tolist()
    following = [token for document in documents for token in [*document[1:].tolist(), *[-100] * (len(document) > 0)]]
    if len(stream) < length:
        with pytest.raises(SequenceParallelConfigError):
            PackedDocuments(documents, length)
        return
    rows = [PackedDocuments(documents, length)[index] for index in range(len(stream) // length)]
    assert [token for row in rows for token in row["input_ids"].tolist()] == stream[: length * len(rows)]
    assert [token for row in rows for token in row["labels"].tolist()] == following[: length * len(rows)]
    for row in rows:
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        ranges = MaskSpec(cu_seqlens=(*starts, length)).documents(length)
        assert row["position_ids"].tolist() == [place for document in ranges for place in range(len(document))]


@pytest.mark.parametrize("seed", ["run-7", 1.5, True, None, b"7", (1, 2), torch.tensor(True), 2**63])
def test_a_seed_that_is_no_integer_is_refused(seed: Any) -> None:
    """Text hashes to another number in every process, so every rank would shuffle by itself."""
    with pytest.raises(SequenceParallelConfigError, match=r"seed.*the same on every rank"):
        SequenceParallelBatchSampler(9, global_batch_size=3, micro_batch_size=1, seed=seed)


def test_a_seed_is_the_same_of_every_kind() -> None:
    orders = [
        list(SequenceParallelBatchSampler(9, global_batch_size=3, micro_batch_size=1, seed=seed))
        for seed in (7, np.int16(7), torch.tensor(7))
    ]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 9.0}, {"global_batch_size": "3"}, {"micro_batch_size": True}, {"trained": 3.0}, {"trained": -3}],
)
def test_counts_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    sizes = {"samples": 9, "global_batch_size": 3, "micro_batch_size": 1, **wrong}
    with pytest.raises(SequenceParallelConfigError, match=f"{name}={value!r}"):
        SequenceParallelBatchSampler(**sizes)
    if name != "samples":
        sizes.pop("samples")
        with pytest.raises(SequenceParallelConfigError, match=f"{name}={value!r}"):
            SequenceParallelStream(range(9), **sizes)


def test_tokens_are_not_cut_to_integers() -> None:
    with pytest.raises(SequenceParallelConfigError, match="token ids are integers"):
        PackedDocuments([[1, 2], [3.7, 4.0]], 2)[1]
    with pytest.raises(SequenceParallelConfigError, match=r"length=2\.5"):
        PackedDocuments([[1, 2]], 2.5)
    assert PackedDocuments([[], [1, 2]], 2)[0]["input_ids"].tolist() == [1, 2]
