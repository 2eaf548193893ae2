"""Bytes on one rank in one step, as arithmetic: model states, what is kept, and the dearest moment beside it.

Bytes of one local token, in bf16; h is the width of the residual stream, A that of all query heads, K that of keys (and
as much of values), H counts query heads, I is the width inside the MLP and V the vocabulary. Under tensor parallelism
all but h are a rank's part. A layer that is whole in memory (run without recomputation, or just run again) holds

    norms          16 h     Transformers computes them in fp32: per norm 4 h wide, 2 h normed, 2 h scaled; 4 h in tiles
    attention      4 A + 4 K + 4 H, and 2 A more under Ulysses, whose output lies on both sides of its way back
    MLP            8 I      gate, its activation, up, and their product; 4 I without a gate, 0 in tiles

and on its way back, at its dearest moments,

    in the MLP     the layer, 4 I and 2 h more; in tiles the layer, 4 h, and of a tile 12 I and 2 h
    in the norm    the layer without its MLP, and 18 h
    in attention   10 h and what the method's backward pass needs beside its inputs

The head without tiles takes 14 V and 8 h: logits in bf16 and fp32, their log-softmax, and its gradient. On
Megatron-core (without fused kernels) norms and sums keep 21 h, a gated MLP 10 I, and the head takes 6 V and 12 h.
`tests/unit/test_planner_memory.py` holds these against dry runs of Transformers' models.
"""

from __future__ import annotations

from typing import NamedTuple

from dsp_plugin.config.memory import Bytes
from dsp_plugin.layout import shard_sizes
from dsp_plugin.methods.head_partition import HeadPartition, head_partition
from dsp_plugin.methods.head_rounds import head_rounds, most_rounds
from dsp_plugin.planner.arrangement import Arrangement
from dsp_plugin.planner.shapes import Shapes
from dsp_plugin.tiles.mlp import AUTO_MLP_BYTES, bytes_of_token, tile_count
from dsp_plugin.tiles.spec import auto_tile_tokens

_WIDTH = 2
# Layers whose checkpoints are on the device while those of others wait in host memory: the one that is computed, and
# one that leaves or comes. That of the last layer never leaves.
_ON_DEVICE, _STAYS = 2, 1
# Of a token: its number, its label, and what is counted of them. Rotary embeddings take 4 bytes of a head's width more.
_BESIDE = 140


class Memory(NamedTuple):
    """Bytes on the busiest rank.

    Attributes:
        weights: of the model, as they are kept.
        gradients: likewise.
        optimizer: moments, and weights in fp32.
        moving: of weights that ZeRO makes whole for a moment, and of gradients that it has not reduced yet.
        kept: by the forward pass for the backward pass, on the device.
        moment: the most that is alive beside them.
        peak: when that is.
        host: of checkpoints that wait in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    moving: int
    kept: int
    moment: int
    peak: str
    host: int

    @property
    def device(self) -> int:
        """All on the device."""
        return self.weights + self.gradients + self.optimizer + self.moving + self.kept + self.moment

    @property
    def activations(self) -> int:
        """What a dry run calls so."""
        return self.kept + self.moment


class _Widths(NamedTuple):
    """Values of one local token."""

    hidden: int
    queries: int
    keys: int
    gathered_queries: int
    gathered_keys: int
    heads: int
    inside: int
    vocabulary: int


def memory_of(shapes: Shapes, how: Arrangement, length: int) -> Memory:
    """What a step over sequences of ``length`` tokens, one at a time, takes of the busiest rank.

    Args:
        shapes: of the whole model.
    """
    tokens = shard_sizes(length, how.size)[0]
    widths = _widths(shapes, how)
    layer = _layer(shapes, how, widths)
    recomputed = how.recompute != "none"
    checkpoint = _WIDTH * widths.hidden // (how.tensor if how.framework == "megatron" else 1)
    tape = _tape(how, widths) if how.recompute == "keep_attention" else 0
    each = checkpoint + tape if recomputed else sum(layer)
    # The first pipeline stage holds those of as many micro batches as there are stages.
    layers = -(-shapes.layers // how.pipeline) * min(how.micro_batches, how.pipeline)
    host = max(layers - _STAYS, 0) * each * tokens if how.memory.offload and recomputed else 0
    if isinstance(how.memory.offload, Bytes):
        host = min(host, int(how.memory.offload))
    here = max(layers * each * tokens - host, min(layers, _ON_DEVICE) * each * tokens)
    kept = here + (4 * shapes.head_dim + _BESIDE) * tokens
    # What is kept of a layer that was not recomputed is part of its moments.
    own = 0 if recomputed else each * tokens
    moments = {name: nbytes - own for name, nbytes in _layer_moments(shapes, how, widths, layer, length).items()}
    tiled = how.framework == "deepspeed" and how.memory.mlp_tiles > 1
    moments["the last norm"] = (6 + 18 // how.memory.mlp_tiles if tiled else 24) * widths.hidden * tokens
    moments["the head"] = _head(how, widths, tokens)
    peak = max(moments, key=lambda name: moments[name])
    weights, gradients, optimizer = model_states(shapes, how)
    return Memory(weights, gradients, optimizer, _moving(shapes, how), kept, moments[peak], peak, host)


def model_states(shapes: Shapes, how: Arrangement) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer (Adam) on the busiest rank, training in bf16.

    DeepSpeed keeps gradients in bf16 and shards by ZeRO's stage (arXiv 1910.02054). Megatron-core keeps them in fp32,
    and its distributed optimizer shards nothing but the optimizer.
    """
    parameters = rank_parameters(shapes, how)
    share = -(-parameters // how.sharing)
    if how.framework == "megatron":
        return 2 * parameters, 4 * parameters, 12 * (share if how.stage else parameters)
    return (
        2 * (share if how.stage >= 3 else parameters),
        2 * (share if how.stage >= 2 else parameters),
        12 * (share if how.stage >= 1 else parameters),
    )


def rank_parameters(shapes: Shapes, how: Arrangement) -> int:
    """Parameters of the largest part that tensor and pipeline parallelism leave of the model."""
    layers = shapes.parameters - shapes.head_parameters * (1 if shapes.tied else 2)
    stage = -(-layers * -(-shapes.layers // how.pipeline) // shapes.layers)
    ends = 1 if shapes.tied or how.pipeline > 1 else 2
    return -(-(stage + ends * shapes.head_parameters) // how.tensor)


def tile_tokens_for(shapes: Shapes, how: Arrangement) -> int:
    """Tokens of a tile of logits that ``"auto"`` takes."""
    return auto_tile_tokens(-(-shapes.vocabulary // how.tensor))


def mlp_tiles_for(shapes: Shapes, how: Arrangement, length: int) -> int:
    """Tiles of an MLP that keep the values inside it within `AUTO_MLP_BYTES`."""
    tokens = shard_sizes(length, how.size)[0]
    widths = [-(-shapes.mlp_width // how.tensor)] * shapes.entrances + [shapes.hidden]
    return tile_count(tokens, bytes_of_token(widths, _WIDTH), AUTO_MLP_BYTES)


def rounds_of(shapes: Shapes, how: Arrangement, length: int) -> int:
    """In how many rounds of heads Ulysses works; an amount of memory means as many as keep a round within it."""
    rounds = how.memory.attention_rounds
    if how.ulysses == 1:
        return 1
    if not isinstance(rounds, Bytes):
        return int(rounds)
    part = _part(shapes, how)
    most = most_rounds(part, whole_groups=how.ring > 1)
    fitting = (count for count in range(1, most) if _round_bytes(shapes, how, length, part, count) <= rounds)
    return next(fitting, most)


def gathered_bytes(shapes: Shapes, how: Arrangement, length: int) -> int:
    """Of q, k, v and the output of one attention that Ulysses has exchanged, without rounds."""
    return _round_bytes(shapes, how, length, _part(shapes, how), 1)


def _round_bytes(shapes: Shapes, how: Arrangement, length: int, part: HeadPartition, count: int) -> int:
    tokens = shard_sizes(length, how.ring)[0]
    return tokens * _WIDTH * head_rounds(part, count).widest(shapes.head_dim, shapes.head_dim)


def _part(shapes: Shapes, how: Arrangement) -> HeadPartition:
    heads, kv_heads = max(shapes.heads // how.tensor, 1), max(shapes.kv_heads // how.tensor, 1)
    return head_partition(heads, kv_heads, how.ulysses)


class _Layer(NamedTuple):
    """Bytes of one token of one layer that is whole in memory."""

    norms: int
    attention: int
    mlp: int


def _widths(shapes: Shapes, how: Arrangement) -> _Widths:
    heads = max(shapes.heads // how.tensor, 1)
    kv_heads = max(shapes.kv_heads // how.tensor, 1)
    part = _part(shapes, how)
    mine = max(how.ulysses * len(queries) for queries in part.queries)
    keys = max(how.ulysses * len(found) for found in part.keys)
    return _Widths(
        hidden=shapes.hidden,
        queries=heads * shapes.head_dim,
        keys=kv_heads * shapes.head_dim,
        gathered_queries=mine * shapes.head_dim,
        gathered_keys=keys * shapes.head_dim,
        heads=mine,
        inside=-(-shapes.mlp_width // how.tensor),
        vocabulary=-(-shapes.vocabulary // how.tensor),
    )


def _mlp_values(shapes: Shapes, how: Arrangement) -> int:
    """Tensors of the MLP's inner width that a layer keeps; Megatron-core makes a copy of a gate."""
    return (5 if how.framework == "megatron" else 4) if shapes.gated else 2


def _norms(how: Arrangement, hidden: int) -> int:
    if how.framework == "deepspeed":
        # Tiles keep of a norm what it returns.
        return (4 if how.memory.mlp_tiles > 1 else 16) * hidden
    # Sums of residuals are kept, too; with sequence parallelism a part each.
    return -(-21 * hidden // how.tensor)


def _layer(shapes: Shapes, how: Arrangement, widths: _Widths) -> _Layer:
    attention = 4 * widths.queries + 4 * widths.keys + 4 * widths.heads
    if how.ulysses > 1:
        attention = 2 * (2 * widths.gathered_queries + 2 * widths.gathered_keys) + 4 * widths.heads
        attention += _WIDTH * widths.queries
    mlp = _WIDTH * _mlp_values(shapes, how) * widths.inside if how.memory.mlp_tiles == 1 else 0
    return _Layer(_norms(how, widths.hidden), attention, mlp)


def _tape(how: Arrangement, widths: _Widths) -> int:
    """What `keep_attention` keeps, see `training.recompute`."""
    kept = _WIDTH * widths.queries + 4 * widths.heads
    if how.ulysses > 1:
        kept += _WIDTH * (2 * widths.gathered_queries + 2 * widths.gathered_keys)
    return kept


def _layer_moments(shapes: Shapes, how: Arrangement, widths: _Widths, layer: _Layer, length: int) -> dict[str, int]:
    """Bytes of all tokens at the dearest moments of a layer's way back, the layer itself included."""
    attention = layer.attention
    if how.recompute == "keep_attention":
        # What is on the tape already is not made again.
        attention = 0 if how.ulysses > 1 else 2 * widths.queries + 4 * widths.keys
    tokens, tiles, hidden = shard_sizes(length, how.size)[0], how.memory.mlp_tiles, widths.hidden
    inside = _WIDTH * (_mlp_values(shapes, how) + shapes.entrances) * widths.inside
    in_mlp = (layer.norms + attention + 2 * hidden + inside) * tokens
    if tiles > 1:
        # Gradients of the weights are summed in fp32.
        in_mlp = (layer.norms + 4 * hidden + attention) * tokens + (inside + 2 * hidden) * -(-tokens // tiles)
        in_mlp += 4 * shapes.mlp_matrices * hidden * widths.inside
    norm = 18 * hidden if how.framework == "deepspeed" else -(-18 * hidden // how.tensor)
    if how.framework == "deepspeed" and tiles > 1:
        norm = 4 * hidden + 18 * hidden // tiles
    moment = _attention_moment(how, widths, rounds_of(shapes, how, length))
    return {
        "the MLP of a layer": in_mlp,
        "a norm of a layer": (layer.norms + attention + norm) * tokens,
        "attention of a layer": (layer.norms // 2 + 2 * hidden + moment) * tokens,
    }


def _attention_moment(how: Arrangement, widths: _Widths, rounds: int) -> int:
    """What is alive of q, k, v, the output and their gradients, measured by dry runs."""
    queries, keys, heads = widths.gathered_queries, widths.gathered_keys, widths.heads
    if how.method == "lightseq" and how.ring > 1:
        return 22 * queries + 36 * keys + 8 * heads
    if how.ring > 1:
        # Gradients in fp32, those of keys on their way included.
        if rounds > 1:
            return (19 * queries + 10 * queries // rounds) // 2 + 4 * keys + 24 * keys // rounds + 4 * heads
        return (12 * queries + 28 * keys if how.ulysses > 1 else 14 * queries + 22 * keys) + 4 * heads
    if how.ulysses > 1:
        if rounds > 1:
            return (18 * queries + 17 * keys) // 2
        return 8 * queries + 16 * keys
    return 8 * queries + 8 * keys + 4 * heads


def _head(how: Arrangement, widths: _Widths, tokens: int) -> int:
    tile = how.memory.tile_tokens
    if tile is None and how.framework == "megatron":
        return (6 * widths.vocabulary + 12 * widths.hidden) * tokens
    if tile is None:
        return (14 * widths.vocabulary + 8 * widths.hidden) * tokens
    # A tile in fp32 and the product that it is made of, or the one that its gradient is multiplied in; the weight's
    # gradient, added up in fp32, and the hidden states'.
    alive = min(tile, tokens) * 6 * widths.vocabulary + 4 * widths.vocabulary * widths.hidden
    return alive + (8 + _WIDTH) * widths.hidden * tokens


def _moving(shapes: Shapes, how: Arrangement) -> int:
    """Under ZeRO 3 the largest part that is gathered at a time and one ahead of it; from 2 on the largest gradient."""
    if how.framework != "deepspeed":
        return 0
    ends = [shapes.head_parameters] * (1 if shapes.tied else 2)
    largest, second = sorted([*ends, shapes.layer_parameters, shapes.layer_parameters])[:-3:-1]
    gathered = largest + second if how.stage == 3 else 0
    return _WIDTH * (gathered + (largest if how.stage >= 2 else 0)) // how.tensor
