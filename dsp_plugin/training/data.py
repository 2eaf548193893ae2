"""Which samples a rank reads: the same on the ranks that share a sequence, and the same in every batch at any sharding.

The samples are one endless order, epoch after epoch, each shuffled by (seed, epoch). Optimizer step k trains on samples
k * B to (k + 1) * B of it, B the global batch size, whatever ranks there are; ranks and micro batches only share them
out. What comes next thus depends on the seed and on how many samples a run has trained on, and on nothing else: a
restart needs that number alone, also with other sequence-parallel or data-parallel sizes, or other workers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.integers import MOST, integer

IGNORED = -100
"""The label of a token that counts for nothing."""


@dataclass(frozen=True)
class _Share:
    """How a global batch is shared out: micro step by micro step, a micro batch to each replica.

    Raises:
        SequenceParallelConfigError: the sizes do not multiply.
    """

    global_batch_size: int
    micro_batch_size: int
    replicas: int
    replica: int

    @classmethod
    def of(cls, global_batch_size: int, micro_batch_size: int, groups: SequenceParallelGroups | None) -> _Share:
        replicas, replica = (1, 0) if groups is None else (groups.dp.size, groups.dp.rank)
        return cls(global_batch_size, micro_batch_size, replicas, replica)

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size"):
            object.__setattr__(self, name, integer(getattr(self, name), name, least=1, remedy="count samples"))
        unit = self.micro_batch_size * self.replicas
        if self.global_batch_size % unit:
            raise SequenceParallelConfigError(
                setting="global_batch_size",
                value=self.global_batch_size,
                why=f"{self.replicas} replicas take micro batches of {self.micro_batch_size} samples each, "
                f"{self.replicas} * {self.micro_batch_size} = {unit} at a time, which does not divide it",
                remedy=f"make it a multiple of {unit}",
            )

    def start_of(self, trained: int) -> int:
        """The first micro step after so many samples.

        Raises:
            SequenceParallelConfigError: they are not whole optimizer steps.
        """
        trained = integer(trained, "trained", remedy="count the samples of the finished steps")
        if trained % self.global_batch_size:
            raise SequenceParallelConfigError(
                setting="trained",
                value=trained,
                why=f"an optimizer step is {self.global_batch_size} samples, and {trained} mod "
                f"{self.global_batch_size} = {trained % self.global_batch_size}",
                remedy="give the samples of the finished steps: their number times global_batch_size",
            )
        return trained // (self.micro_batch_size * self.replicas)

    def micro_batch(self, micro_step: int) -> range:
        """The places, in the endless order, of this replica's samples."""
        first = (micro_step * self.replicas + self.replica) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class SequenceParallelBatchSampler(Sampler[list[int]]):
    """Micro batches of indices, for ``DataLoader(dataset, batch_sampler=...)``.

    A pass goes on where the last one ended, to the end of the epoch or of the optimizer step that crosses it. Without
    `drop_last`, that step begins the next epoch: every sample comes once in each, in full batches.

    Args:
        samples: in the dataset.
        global_batch_size: samples of an optimizer step, over all replicas and micro batches.
        micro_batch_size: samples that a sequence group takes at a time.
        groups: the ranks' groups, such as ``engine.sequence_parallel_groups``; None for one replica.
        seed: of the shuffling. shuffle: False keeps the dataset's order.
        drop_last: an epoch ends with the last optimizer step that it fills; what is left over is not read.
        trained: samples that the run has trained on before, such as ``engine.global_samples`` after a checkpoint.

    Raises:
        SequenceParallelConfigError: a number is no integer, the sizes do not multiply, or with `drop_last` the dataset
            fills no step.
    """

    def __init__(
        self,
        samples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        groups: SequenceParallelGroups | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        trained: int = 0,
    ) -> None:
        self._share = _Share.of(global_batch_size, micro_batch_size, groups)
        # A seed of another kind, such as text, hashes to another number in every process.
        self._seed = integer(seed, "seed", least=-MOST, remedy="give an integer, the same on every rank")
        self._samples, self._shuffle = integer(samples, "samples", remedy="give the dataset's length"), shuffle
        self._epoch_length = samples - samples % global_batch_size if drop_last else samples
        if self._epoch_length < 1:
            raise SequenceParallelConfigError(
                setting="samples",
                value=samples,
                why=f"the dataset fills no optimizer step of {global_batch_size} samples",
                remedy=f"give at least {global_batch_size if drop_last else 1}, or a smaller global_batch_size",
            )
        self._next = self._share.start_of(trained)
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def __len__(self) -> int:
        """Micro batches of the next pass."""
        return self._end() - self._next

    def __iter__(self) -> Iterator[list[int]]:
        """This replica's micro batches, to the end of the pass."""
        first, self._next = self._next, self._end()
        for micro_step in range(first, self._next):
            yield [self._index(place) for place in self._share.micro_batch(micro_step)]

    def _end(self) -> int:
        """The micro step that begins the pass after the next one."""
        share = self._share
        per_step = share.global_batch_size // (share.micro_batch_size * share.replicas)
        begun = self._next // per_step * share.global_batch_size
        epoch_end = (begun // self._epoch_length + 1) * self._epoch_length
        return -(-epoch_end // share.global_batch_size) * per_step

    def _index(self, place: int) -> int:
        epoch, position = divmod(place, self._epoch_length)
        if not self._shuffle:
            return position
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(hash((self._seed, epoch)) % 2**63)
            self._order = (epoch, torch.randperm(self._samples, generator=generator).tolist())
        return int(self._order[1][position])


class SequenceParallelStream(IterableDataset[Any]):
    """What is read in order, and not by index, shared out in the same way: peers get the same samples.

    It never ends: behind the source's last sample comes its first again. Give the DataLoader the same
    ``micro_batch_size`` as ``batch_size``. Every rank and worker reads the whole source and keeps its own.

    Args:
        source: samples in order, equal on all ranks; iterated anew for each epoch.
        global_batch_size, micro_batch_size, groups: as in `SequenceParallelBatchSampler`.
        trained: samples that the run has trained on before, which are read and skipped.

    Raises:
        SequenceParallelConfigError: the sizes do not multiply.
    """

    def __init__(
        self,
        source: Iterable[Any],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        groups: SequenceParallelGroups | None = None,
        trained: int = 0,
    ) -> None:
        self._share = _Share.of(global_batch_size, micro_batch_size, groups)
        self._source = source
        self._trained = trained
        self._share.start_of(trained)

    def __iter__(self) -> Iterator[Any]:
        """This worker's samples of this replica's micro batches."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = self._share
        samples = islice(self._endless(), self._trained, None)
        micro_step = 0
        while len(step := list(islice(samples, share.global_batch_size))) == share.global_batch_size:
            for first in range(0, share.global_batch_size, share.micro_batch_size * share.replicas):
                # A DataLoader takes batch n from worker n mod workers.
                if micro_step % workers == number:
                    mine = first + share.replica * share.micro_batch_size
                    yield from step[mine : mine + share.micro_batch_size]
                micro_step += 1

    def _endless(self) -> Iterator[Any]:
        read = True
        while read:
            read = False
            for sample in self._source:
                read = True
                yield sample


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """Documents of any lengths, packed one behind the other into rows of one length.

    A document that a row's end cuts goes on in the next row as a document of its own, whose attention begins there.
    What does not fill the last row is left out. Rows depend on the documents alone, so any sampler may choose among
    them.

    A row is ``input_ids`` [length], ``labels`` [length] (the next token; -100 behind a document's last) and
    ``position_ids`` [length] (from 0 in each document, by which borders are known), all int64.

    Args:
        documents: token ids, each document a sequence or a tensor of one dim.
        length: tokens of a row.

    Raises:
        SequenceParallelConfigError: the documents fill no row; of a row, that its tokens are no integers.
    """

    def __init__(self, documents: Sequence[Sequence[int] | Tensor], length: int) -> None:
        self._length = length = integer(length, "length", least=1, remedy="count the tokens of a row")
        self._documents = documents
        self._ends = list(accumulate(len(document) for document in documents))
        if not self._ends or self._ends[-1] < length:
            raise SequenceParallelConfigError(
                setting="length",
                value=length,
                why=f"the documents have {self._ends[-1] if self._ends else 0} tokens in all and fill no row",
                remedy="give more documents or shorter rows",
            )

    def __len__(self) -> int:
        """Rows."""
        return self._ends[-1] // self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        parts = []
        begin, end = index * self._length, (index + 1) * self._length
        number = bisect_right(self._ends, begin)
        while begin < end:
            document = _tokens(self._documents[number], number)
            first = begin - (self._ends[number] - len(document))
            parts.append(document[first : first + end - begin])
            after = document[first + len(parts[-1]) : first + len(parts[-1]) + 1]
            begin += len(parts[-1])
            number += 1
        tokens, lengths = torch.cat(parts), torch.tensor([len(part) for part in parts])
        ends = lengths.cumsum(0)
        labels = torch.cat([tokens[1:], after if len(after) else after.new_full((1,), IGNORED)])
        labels[ends[:-1] - 1] = IGNORED
        positions = torch.arange(self._length) - torch.repeat_interleave(ends - lengths, lengths)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def _tokens(document: Sequence[int] | Tensor, number: int) -> Tensor:
    tokens = torch.as_tensor(document)
    # Of nothing torch makes floats.
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        raise SequenceParallelConfigError(
            setting=f"documents[{number}]",
            value=tokens.dtype,
            why="token ids are integers, and would be cut to them",
            remedy="give the tokenizer's ids",
        )
    return tokens.to(torch.int64)
