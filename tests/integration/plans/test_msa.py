"""Alignments of sequences, [rows, columns]: fair-esm's MSA Transformer, and the row/column model that it is not.

The MSA Transformer adds up the logits of its row attention over all rows before the softmax: along columns it attends,
and along rows it sums. Only the batch is free there.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from parity import Case, assert_parity, faults
from torch import Tensor, nn

from dsp_plugin import Plan, Region, SequenceParallelConfigError, Stage
from dsp_plugin.spawn import RankFailure

pytestmark = pytest.mark.distributed

WIDTH, HEADS = 24, 4
# None of 2, 3 and 4 divides either.
ROWS, COLUMNS = 5, 7
PADDING = 1


def alignment(batch: int) -> Tensor:
    """Token ids [B, R, C]: alignments of other depths and lengths than the batch's are padded."""
    tokens = torch.randint(4, 24, (batch, ROWS, COLUMNS))
    tokens[0, :, -2:] = PADDING
    tokens[-1, -1:] = PADDING
    return tokens


# --- fair-esm's own model


def msa_transformer(batch: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    from esm.data import Alphabet
    from esm.model.msa_transformer import MSATransformer

    settings = Namespace(
        layers=2,
        embed_dim=WIDTH,
        ffn_embed_dim=32,
        attention_heads=HEADS,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_tokens=2**14,
        max_positions=64,
        embed_positions_msa=True,
        embed_positions_msa_dim=WIDTH,
    )
    return MSATransformer(settings, Alphabet.from_architecture("msa_transformer")), {"tokens": alignment(batch)}


def tied_plan(batch_dim: str | None) -> Plan:
    """Row attention computes along both dims, column attention along rows."""
    mask = {"self_attn_padding_mask": "b r c"}
    return Plan(
        tokens="r c b e",
        stages=(
            Stage("layers.*.row_self_attention", ("r", "c"), follows=mask),
            Stage("layers.*.column_self_attention", ("r",), follows=mask),
        ),
        batch_dim=batch_dim,
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tied_rows_are_sharded_along_the_batch(size):
    """The batch is one more dim. Where some ranks have no alignment, column attention switches to what all have."""
    plan = tied_plan(batch_dim=None)
    cases = [Case(msa_transformer, {"batch": batch}, plan=plan) for batch in (2, 5)]
    few, many, _ = assert_parity(size, *cases, Case(msa_transformer, plan=plan, dtype=torch.float32))
    assert [stage[1] for stage in many.stages] == ["b", "b", "b", "b"]
    assert [stage[1] for stage in few.stages] == (["b", "b", "b", "b"] if size == 2 else ["b", "c", "b", "c"])


def test_tied_rows_leave_no_dim_to_shard_but_the_batch():
    with pytest.raises(RankFailure) as failure:
        assert_parity(2, Case(msa_transformer, plan=tied_plan(batch_dim="b")))
    assert len(failure.value.errors) == 2, "all ranks refuse, before anything is sent"
    for error in failure.value.errors.values():
        assert isinstance(error, SequenceParallelConfigError)
        assert "layers.0.row_self_attention" in str(error)
        assert "with size=2 no dim can be sharded in this stage" in str(error)
        assert "the stage computes along r and names no attention" in str(error)
        assert "the stage computes along c and names no attention" in str(error)
        assert "set batch_dim to None if the batch may be sharded" in str(error)


# --- rows that attend on their own


class RowColumnLayer(nn.Module):
    """esm's attention over columns, unmodified, along rows and, on the transposed alignment, along columns."""

    def __init__(self) -> None:
        super().__init__()
        from esm.axial_attention import ColumnSelfAttention

        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.row, self.column = ColumnSelfAttention(WIDTH, HEADS), ColumnSelfAttention(WIDTH, HEADS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """[R, C, B, E] and a mask [B, R, C], true where there is nothing, to [R, C, B, E]."""
        mixed, _ = self.row(self.norms[0](x).transpose(0, 1), self_attn_padding_mask=padding.transpose(1, 2))
        x = x + mixed.transpose(0, 1)
        mixed, _ = self.column(self.norms[1](x), self_attn_padding_mask=padding)
        x = x + mixed
        return x + self.mlp(self.norms[2](x))


class RowColumnEncoder(nn.Module):
    """The layers alone, so that a plan can say where tokens are sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RowColumnLayer() for _ in range(2))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """As the layers."""
        for layer in self.layers:
            x = layer(x, padding)
        return x


class RowColumnModel(nn.Module):
    """Token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, WIDTH)
        self.encoder = RowColumnEncoder()
        self.head = nn.Linear(WIDTH, 33)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, R, C] to [B, R, C, 33]."""
        padding = tokens == PADDING
        x = rearrange(self.embed(tokens), "b r c e -> r c b e")
        return self.head(rearrange(self.encoder(x, padding), "r c b e -> b r c e"))


def row_column(batch: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    return RowColumnModel(), {"tokens": alignment(batch)}


# The mask follows the shard in either attention; the row attention gets both transposed.
ROW_COLUMN = Plan(
    tokens="r c b e",
    stages=(
        Stage("encoder.layers.*.row", ("c",), layout="c r b e", follows={"self_attn_padding_mask": "b c r"}),
        Stage("encoder.layers.*.column", ("r",), follows={"self_attn_padding_mask": "b r c"}),
    ),
    between="r",
    region=Region("encoder"),
)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_untied_rows_and_columns_switch(size):
    cases = [Case(row_column, plan=ROW_COLUMN), Case(row_column, plan=ROW_COLUMN, dtype=torch.float32)]
    for result in assert_parity(size, *cases):
        row, column, *_ = result.stages
        assert row == ("encoder.layers.0.row", "r", "keep", "local")
        assert column == ("encoder.layers.0.column", "c", "switch r -> c and back", "local")


def test_a_mask_that_does_not_follow_is_named():
    row, column = ROW_COLUMN.stages
    (fault,) = faults(2, Case(row_column, plan=replace(ROW_COLUMN, stages=(row, replace(column, follows={})))))
    assert "in encoder.layers.0.column (sharded c): the sharded pass broke off" in fault
    assert "must match the size of tensor b (4)" in fault
    assert "'self_attn_padding_mask' (2, 5, 7) has a dim of 7 = c entries and is not in follows" in fault
