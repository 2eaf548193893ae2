"""Packed rows as collators write them: documents by positions, by a mask that numbers them, or by both."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_models import LENGTH, VOCABULARY, build_model
from torch import Tensor
from transformers import DataCollatorWithFlattening

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups, UnsupportedError
from dsp_plugin.layout import Layout
from dsp_plugin.patches.transformers import ShardedCausalLM, checked_section
from dsp_plugin.patches.transformers import rows as rows_of_batches
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

DOCUMENTS = (6, 1, LENGTH - 9)
PADDING = LENGTH - sum(DOCUMENTS)
ROWS = 2


def restarting(documents: tuple[int, ...], padding: int = 0) -> Tensor:
    """Positions; those of padding are as collators fill them."""
    row = torch.cat([*(torch.arange(n) for n in documents), torch.ones(padding, dtype=torch.int64)])
    return row.expand(ROWS, -1)


def numbered(documents: tuple[int, ...], padding: int = 0) -> Tensor:
    numbers = [number for number, n in enumerate(documents, 1) for _ in range(n)]
    return torch.tensor([numbers + [0] * padding]).expand(ROWS, -1)


def ones(padding: int = 0) -> Tensor:
    return numbered((LENGTH - padding,), padding)


def unlike(padding: int) -> Tensor:
    """Ones, with padding in the second row alone."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[1, LENGTH - padding :] = 0
    return mask


FULL = (*DOCUMENTS[:-1], LENGTH - sum(DOCUMENTS[:-1]))
# Name -> how documents are told, and how many tokens at the end are padding, in which rows.
TOLD: dict[str, tuple[dict[str, Tensor], int]] = {
    "positions": ({"position_ids": restarting(FULL)}, 0),
    "positions, mask of ones": ({"position_ids": restarting(FULL), "attention_mask": ones()}, 0),
    "positions, mask of truth values": ({"position_ids": restarting(FULL), "attention_mask": ones().bool()}, 0),
    "mask numbers": ({"attention_mask": numbered(FULL)}, 0),
    "mask numbers, positions go on": ({"position_ids": restarting((LENGTH,)), "attention_mask": numbered(FULL)}, 0),
    "both": ({"position_ids": restarting(FULL), "attention_mask": numbered(FULL)}, 0),
    "both, padded": (
        {"position_ids": restarting(DOCUMENTS, PADDING), "attention_mask": numbered(DOCUMENTS, PADDING)},
        PADDING,
    ),
    "positions, rows padded unlike": ({"position_ids": restarting(FULL), "attention_mask": unlike(PADDING)}, PADDING),
}


def _batch(padding: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[0, :4] = -100
    if padding:
        labels[:, -padding:] = -100
    return {"input_ids": tokens, "labels": labels}


def _model() -> Any:
    torch.manual_seed(0)
    return build_model("mistral", sliding_window=4).double()


def _mine(method: str) -> Any:
    model = _model()
    section = {"method": method, "size": dist.get_world_size() if dist.is_initialized() else 1}
    config: SequenceParallelConfig = checked_section(model, section)
    groups = SequenceParallelGroups.build(config) if dist.is_initialized() else SequenceParallelGroups.single()
    ShardedCausalLM(model, config, groups)
    return model


def _gradients(model: Any, **call: Any) -> tuple[float, list[Tensor]]:
    loss = model(**call).loss
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def _errors(method: str) -> dict[str, float]:
    """The worst of the loss and of each gradient, against every document in a row of its own batch position."""
    found = {}
    for name, (told, padding) in TOLD.items():
        # Transformers' eager attention keeps documents apart by positions, where nothing else is passed.
        expected, wanted = _gradients(_model(), **_batch(padding), position_ids=restarting(FULL), use_cache=False)
        if "go on" in name or name == "mask numbers":
            expected, wanted = _apart(padding)
        loss, gradients = _gradients(_mine(method), **_batch(padding), **told)
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        scale = max(gradient.abs().max().item() for gradient in wanted)
        worst = max((a - b).abs().max().item() for a, b in zip(gradients, wanted, strict=True)) / scale
        found[name] = max(worst, abs(loss - expected))
    return found


def _apart(padding: int) -> tuple[float, list[Tensor]]:
    """Every document by itself, at positions that go on, its loss weighed by its labels."""
    model, batch = _model(), _batch(padding)
    borders = [0, *accumulate(FULL)]
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in pairwise(borders):
        logits = model(
            input_ids=batch["input_ids"][:, start:stop],
            position_ids=torch.arange(start, stop).expand(ROWS, -1),
            attention_mask=torch.ones(ROWS, stop - start, dtype=torch.int64),
        ).logits
        target = shifted[:, start:stop].flatten()
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target, ignore_index=-100, reduction="sum"
        )
    loss = total / (shifted != -100).sum()
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def test_the_host_waits_once_for_rows_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    def counted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        waits.append(sum(tensor.nbytes for tensor in tensors.values()))
        return on_host(tensors)

    on_host = rows_of_batches._on_host
    monkeypatch.setattr(rows_of_batches, "_on_host", counted)
    for name, (told, padding) in TOLD.items():
        waits.clear()
        rows_of_batches.take_rows(dict(told), None, ROWS, LENGTH)
        assert len(waits) == (2 if padding else 1), name
        # A byte for two neighbours, by positions and by the mask.
        assert waits[0] <= 2 * ROWS * LENGTH, name


def _every_method() -> dict[str, dict[str, float]]:
    return {method: _errors(method) for method in ("ulysses", "ring", "lightseq")}


def test_documents_are_read_from_what_says_more() -> None:
    for found in spawn(_every_method, 2, timeout=150):
        for method, errors in found.items():
            # Transformers takes the loss of fp64 logits in fp32.
            assert max(errors.values()) < 1e-6, (method, errors)


def _of_many(documents: tuple[int, ...], method: str) -> float:
    """The worst gradient, and the loss, of a batch of many short documents, against Transformers' own."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (1, sum(documents)), generator=generator)
    told = {"input_ids": tokens, "labels": tokens, "position_ids": restarting(documents)[:1]}
    expected, wanted = _gradients(_model(), **told, use_cache=False)
    loss, gradients = _gradients(_mine(method), **told)
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    scale = max(gradient.abs().max().item() for gradient in wanted)
    worst = max((a - b).abs().max().item() for a, b in zip(gradients, wanted, strict=True)) / scale
    return max(worst, abs(loss - expected))


@pytest.mark.parametrize(("method", "size"), [("ring", 2), ("usp", 2), ("ring", 3)])
def test_short_documents_lie_whole_on_a_rank(method: str, size: int) -> None:
    documents = (5, 3, 9, 5, 3, 4, 4, 9, 5, 3, 3, 4, 5, 4, 3, 9, 3, 2)
    ends = (0, *accumulate(documents))
    cut = Layout("zigzag", ends[-1], size, documents=ends)
    assert [Layout.of_documents("zigzag", ends[-1], size, ends).spans(r) for r in range(size)] != [
        cut.spans(r) for r in range(size)
    ]
    assert max(spawn(_of_many, size, documents, method, timeout=150)) < 1e-6


def borders(*documents: int) -> dict[str, Any]:
    """What flash attention takes, of one row."""
    ends = torch.tensor([0, *accumulate(documents)], dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(documents), "max_length_k": 99}


UNLIKE = {"max_length_k": max(FULL)}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            {"position_ids": restarting((5, LENGTH - 5)), "attention_mask": numbered((6, LENGTH - 6))},
            "start again in the middle of a document of attention_mask",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2] + [1] * (LENGTH - 4)]).expand(ROWS, -1)}, "go down"),
        (
            {"seq_idx": numbered((5, LENGTH - 5)), "attention_mask": numbered((6, LENGTH - 6))},
            "seq_idx and attention_mask.*other places",
        ),
        ({"seq_idx": ones(), "position_ids": restarting(FULL)}, "in the middle of a document of seq_idx"),
        ({"seq_idx": numbered(FULL)[:, :-1]}, r"seq_idx.*expected \[2, 13\]"),
        ({**borders(LENGTH, 4, LENGTH - 4), "max_length_k": LENGTH - 1}, "max_length_q and max_length_k"),
        (borders(LENGTH + 1, LENGTH - 1) | UNLIKE, "goes on from row 0"),
        (borders(LENGTH, 3) | UNLIKE, r"end at 26, the tokens of 2 \* 13"),
        (borders(*FULL, *FULL) | {"cu_seq_lens_k": torch.tensor([0, 3, 26])}, "queries and keys"),
        (
            borders(*FULL, *FULL) | UNLIKE | {"seq_idx": numbered((5, LENGTH - 5))},
            "cu_seq_lens_q and seq_idx.*other places",
        ),
        (borders(*FULL, *FULL) | {"max_length_q": 5, "max_length_k": 5}, "it is 5, and a document has 6 tokens"),
        ({"max_length_q": 5}, "it is 5, and a document has 13 tokens"),
    ],
)
def test_contradictions_are_refused(told: dict[str, Any], words: str) -> None:
    with pytest.raises(SequenceParallelConfigError, match=words):
        _mine("ring")(**_batch(0), **told)


def test_windows_over_padding_in_the_midst_of_a_document_are_refused() -> None:
    """Transformers' windows count it; what it stands between would be nearer than there."""
    mask = ones().clone()
    mask[0, 6:8] = 0
    batch = _batch(0)
    batch["labels"][0, 6:9] = -100
    with pytest.raises(UnsupportedError, match="padding in the midst of a document, and a window of 4"):
        _mine("ring")(**batch, attention_mask=mask)


def test_batches_of_collators_that_flatten() -> None:
    """Transformers' and TRL's: what each says beside positions, and alone."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (5, 1, 7)]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batches = [dict(theirs([{"input_ids": row} for row in rows], return_tensors="pt"))]
    if find_spec("trl") is not None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
        batches.append(dict(flat([{"input_ids": row} for row in rows])))
    for batch in batches:
        plain = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
        expected, wanted = _gradients(_model(), **plain, use_cache=False)
        alone = {name: value for name, value in batch.items() if name not in ("position_ids", "seq_idx")}
        # TRL's says it by positions alone before 1.16.
        for told in (batch, alone) if "cu_seq_lens_q" in batch else (batch,):
            loss, gradients = _gradients(_mine("ring"), **told)
            assert loss == pytest.approx(expected, rel=1e-6)
            scale = max(gradient.abs().max() for gradient in wanted)
            assert max((a - b).abs().max() for a, b in zip(gradients, wanted, strict=True)) < 1e-6 * scale
