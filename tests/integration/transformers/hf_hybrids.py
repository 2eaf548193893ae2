"""Hybrids of Transformers, tiny and random in fp64, sharded beside unsharded: what one rank of a world finds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import families
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor

from dsp_plugin import MaskSpec, SequenceParallelGroups, ledger
from dsp_plugin.layout import Layout
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.methods.halo import halo_bytes
from dsp_plugin.patches.transformers import ShardedCausalLM, checked_section, tiny, trials
from dsp_plugin.verification.double import InDouble, backward
from dsp_plugin.verification.model import Verdict, compare

IGNORED = -100
# By row; none of the ranks' borders is one of theirs.
ALIKE = ((0, 5, 6, 17, 23), (0, 5, 6, 17, 23))
UNLIKE = ((0, 9, 23), (0, 2, 14, 15, 23))


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        method: of the softmax layers, where ``exchange`` is given; else of all.
        feature: of `trials.FEATURES`; "left", padding in front; or "alike" and "unlike", packed rows told as ``told``.
    """

    family: str
    method: str
    feature: str = "tokens"
    layout: str = "auto"
    exchange: str = ""
    told: str = ""

    @property
    def name(self) -> str:
        """Names the case."""
        return "-".join(filter(None, (self.family, self.method, self.feature, self.layout, self.exchange, self.told)))

    def section(self, size: int) -> dict[str, Any]:
        """The section of a user."""
        section: dict[str, Any] = {"method": self.method, "size": size, "layout": self.layout}
        if self.exchange:
            section |= {"method": "lasp", "softmax_method": self.method, "exchange": self.exchange}
        if self.method == "usp":
            section["ulysses_size"] = 2 if size == 4 else 1
        return section | {"unverified_model": True}


def built(family: str) -> Any:
    """The family's tiny model."""
    kind = getattr(transformers, families.names()[family])
    config = (kind.config_class or transformers.CONFIG_MAPPING[family])()
    return tiny.random_model(kind, tiny.shrunk(config, **families.SETTINGS.get(family, {}))).train()


def found(cases: Sequence[Case]) -> dict[str, Verdict]:
    """The verdicts by case. Every rank calls this."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    size = dist.get_world_size()
    return {case.name: _packed(case, size) if case.told else _compared(case, size) for case in cases}


def _shard(model: Any, groups: SequenceParallelGroups, section: dict[str, Any]) -> ShardedCausalLM:
    return ShardedCausalLM(model, checked_section(model, section), groups)


def _compared(case: Case, size: int) -> Verdict:
    model, section = built(case.family), case.section(size)
    groups = SequenceParallelGroups.build(checked_section(model, section))
    if case.feature == "left":
        batches = trials.batches(model, "tokens")[:1]
        batches[0]["attention_mask"] = torch.ones_like(batches[0]["input_ids"])
        batches[0]["attention_mask"][1, :6] = 0
        batches[0]["labels"][1, :7] = IGNORED
        subject = trials.prepared(model, "tokens")
    else:
        batches, subject = trials.batches(model, case.feature), trials.prepared(model, case.feature)
    return compare(subject, batches, partial(_shard, section=section), groups)


def _packed(case: Case, size: int) -> Verdict:
    """Packed rows beside every document in a row of its own."""
    borders = ALIKE if case.feature == "alike" else UNLIKE
    batch = trials.batches(built(case.family), "tokens")[0]
    tokens, labels = batch["input_ids"], batch["labels"]
    for row, found_borders in enumerate(borders):
        labels[row, list(found_borders[:-1])] = IGNORED
    with InDouble():
        whole, sharded = built(case.family), built(case.family)
        total = torch.zeros((), dtype=torch.float64)
        for row, found_borders in enumerate(borders):
            for start, stop in pairwise(found_borders):
                logits = whole(input_ids=tokens[row : row + 1, start:stop], use_cache=False).logits[0, :-1]
                following = labels[row, start + 1 : stop]
                total = total + F.cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum")
        expected = total / (labels[:, 1:] != IGNORED).sum()
        backward(expected)
        section = case.section(size)
        _shard(sharded, SequenceParallelGroups.build(checked_section(sharded, section)), section)
        loss = sharded(input_ids=tokens, labels=labels, use_cache=False, **told(case.told, borders)).loss
        backward(loss)
    return _judged(sharded, whole, loss, expected)


def _judged(sharded: Any, whole: Any, loss: Tensor, expected: Tensor) -> Verdict:
    size, worst, of = dist.get_world_size(), 0.0, ""
    largest = max(p.grad.abs().max().item() for p in whole.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad
        dist.all_reduce(gradient)
        exact = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        error = (gradient / size - exact).abs().max().item() / max(exact.abs().max().item(), 1e-4 * largest)
        worst, of = max((worst, of), (error, name))
    off = abs(loss.item() / expected.item() - 1)
    exact = off <= 1e-10 and worst <= 1e-10
    return Verdict("exact" if exact else "wrong", f"{off:.1e} {worst:.1e} {of}", off, worst, of)


def told(how: str, borders: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What says where documents start: positions, and what linear layers know of."""
    lengths = [[stop - start for start, stop in pairwise(row)] for row in borders]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    if how == "seq_idx":
        numbers = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
        return {"position_ids": positions, "seq_idx": numbers.int()}
    flat = torch.tensor([0, *(length for row in lengths for length in row)]).cumsum(0).int()
    longest = max(max(row) for row in lengths)
    return {
        **{"position_ids": positions, "cu_seq_lens_q": flat, "cu_seq_lens_k": flat},
        **{"max_length_q": longest, "max_length_k": longest},
    }


def sent(family: str) -> dict[str, tuple[int, int, int, int]]:
    """Of a layer's exchanges: forward and backward bytes of this rank, and those of the formula."""
    warnings.filterwarnings("ignore")
    size, rank = dist.get_world_size(), dist.get_rank()
    found: dict[str, tuple[int, int, int, int]] = {}
    model = built(family)
    section = {"method": "ulysses", "size": size, "unverified_model": True}
    _shard(model, SequenceParallelGroups.build(checked_section(model, section)), section)
    batch = trials.batches(model, "tokens")[0]
    with InDouble(), ledger() as log:
        backward(model(**batch).loss)
    rows, length = batch["input_ids"].shape
    layout, config = Layout("contiguous", length, size), model.config
    heads, key, value, decay, channels, width = SHAPES[family](config)
    workload = Workload(
        size,
        heads,
        heads,
        length=length,
        batch=rows,
        head_dim=key,
        value_dim=value,
        decay=decay,
        element_size=8,
        gate_size=8,
        mask=MaskSpec(causal=True),
    )
    states = METHODS["lasp"].wire_bytes(workload, rank)
    taps = halo_bytes(layout, rank, width - 1, rows * channels * 8)
    for phase in ("forward", "backward"):
        wanted = getattr(states, phase) + getattr(taps, phase)
        found[phase] = log.bytes(method="lasp", phase=phase), wanted
    return found


def _of_delta(config: Any) -> tuple[Any, ...]:
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * key + heads * value
    return heads, key, value, "gated-delta", channels, config.linear_conv_kernel_dim


def _of_mamba2(config: Any) -> tuple[Any, ...]:
    heads, states, value = config.mamba_n_heads, config.mamba_d_state, config.mamba_d_head
    return heads, states, value, "scalar", heads * value + 2 * config.mamba_n_groups * states, config.mamba_d_conv


# Of the one linear layer that the tiny model has.
SHAPES = {"qwen3_next": _of_delta, "bamba": _of_mamba2}
