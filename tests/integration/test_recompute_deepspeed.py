"""``"recompute": "keep_attention"`` in real DeepSpeed with ZeRO 2, whichever checkpoint function the model calls."""

from __future__ import annotations

import importlib.util
import os
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.kernels import calls
from dsp_plugin.patches import recompute as patches
from dsp_plugin.spawn import spawn

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

WORLD, BATCH, LENGTH, STEPS, WIDTH, HEADS, KV_HEADS, VOCABULARY = 2, 2, 13, 2, 16, 4, 2, 17
TORCH_WAYS = ("torch, non-reentrant", "torch, reentrant")
WAYS = (*TORCH_WAYS, "deepspeed", "deepspeed, non-reentrant", "deepspeed, partitioned", "deepspeed, partitioned on CPU")
METHODS = ("ulysses", "ring", "lightseq")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * WIDTH * KV_HEADS // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.checkpointed: Any = lambda body, x: body(x)

    def forward(self, x_BLC: Tensor) -> Tensor:
        found: Tensor = self.checkpointed(self.body, x_BLC)
        return found

    def body(self, x_BLC: Tensor) -> Tensor:
        heads_BHLD = self.qkv(x_BLC).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
        q, k, v = heads_BHLD.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = x_BLC + self.attn(self.norm(x_BLC))
        return x_BLC + self.mlp(self.norm(x_BLC))


class CausalLM(nn.Module):
    """A model that checkpoints its layers, or not, by the function that it was given."""

    def __init__(self, checkpointed: Any = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.checkpointed = checkpointed or (lambda layer, x: layer(x))

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        x_BLC = self.embed(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x_BLC = self.checkpointed(layer, x_BLC)
        return F.cross_entropy(self.head(x_BLC).flatten(0, 1), labels.flatten())


def batch(step: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    places = torch.arange(LENGTH).expand(BATCH, -1).contiguous()
    return {"input_ids": tokens[:, :-1].contiguous(), "position_ids": places, "labels": tokens[:, 1:].contiguous()}


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def checkpoint_function(way: str, deepspeed: Any) -> Any:
    match way:
        case "torch, non-reentrant":
            return partial(torch_checkpoint.checkpoint, use_reentrant=False)
        case "torch, reentrant":
            return partial(torch_checkpoint.checkpoint, use_reentrant=True)
        case "deepspeed, non-reentrant":
            # By attribute: this one is a plain function.
            return lambda layer, x: deepspeed.checkpointing.non_reentrant_checkpoint(layer, x)
        case "none":
            return None
    return deepspeed.checkpointing.checkpoint


def train(deepspeed: Any, method: str, way: str, recompute: str) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
        "sequence_parallel": {
            "method": method,
            "size": WORLD,
            "recompute": recompute,
            "attention": ["layers.*.attn"],
            "batch": {"input_ids": 1, "position_ids": 1, "labels": 1},
            "loss": {"labels": "labels"},
        },
    }
    torch.manual_seed(0)
    model = CausalLM(checkpoint_function(way, deepspeed))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    deepspeed.checkpointing.configure(
        None,
        partition_activations="partitioned" in way,
        # Not without partitioning: on a machine without accelerators DeepSpeed empties the very tensors it saved.
        checkpoint_in_cpu=way.endswith("on CPU"),
    )
    losses, again = [], []
    for step in range(STEPS):
        loss = engine(**batch(step))
        with ledger() as sent, calls() as made:
            engine.backward(loss)
        again.append((made.forward, sent.bytes(method=method, phase="forward")))
        assert made.backward > 0
        engine.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(engine(**batch(STEPS)).item())
    patched, kept = patches.TORCH.applied, patches.kept()
    engine.destroy()
    return {"losses": losses, "again": again, "patched": patched, "kept": kept, "kept after": patches.kept()}


def train_llama(deepspeed: Any, checkpointed: bool | None, recompute: str) -> dict[str, Any]:
    """Llama with attention dropout, checkpointed as Transformers does it (`checkpointed` is its ``use_reentrant``)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, attention_dropout=0.2, **shape)
    ).train()
    if checkpointed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "sequence_parallel": {"method": "ring", "size": WORLD, "recompute": recompute},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    losses, again = [], []
    for step in range(STEPS):
        tokens = batch(step)["input_ids"]
        loss = engine(input_ids=tokens, labels=tokens).loss
        with ledger() as sent, calls() as made:
            engine.backward(loss)
        again.append((made.forward, sent.bytes(method="ring", phase="forward")))
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return {"losses": losses, "again": again}


def run_llama() -> dict[tuple[bool | None, str], dict[str, Any]]:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(WORLD))
    import deepspeed

    deepspeed.init_distributed()
    cases = [(None, "full"), (True, "keep_attention"), (False, "keep_attention"), (False, "full")]
    return {case: train_llama(deepspeed, *case) for case in cases}


def run() -> dict[tuple[str, str, str], dict[str, Any]]:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(WORLD))
    import deepspeed

    deepspeed.init_distributed()
    cases = [("ulysses", way, "keep_attention") for way in WAYS]
    cases += [
        (method, way, "keep_attention") for method in METHODS[1:] for way in ("torch, non-reentrant", "deepspeed")
    ]
    # Last, so that patches which outlive their engine would show.
    cases += [("ulysses", way, "full") for way in ("torch, non-reentrant", "deepspeed", "none")]
    return {case: train(deepspeed, *case) for case in cases}


@cache
def results() -> list[dict[tuple[str, str, str], dict[str, Any]]]:
    return spawn(run, WORLD, timeout=200)


@cache
def unsharded() -> list[float]:
    torch.manual_seed(0)
    model = CausalLM()
    steps, losses = optimizer(model), []
    for step in range(STEPS):
        loss = model(**batch(step))
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, model(**batch(STEPS)).item()]


@pytest.mark.parametrize(
    ("method", "way"), [*(("ulysses", way) for way in WAYS), ("ring", "deepspeed"), ("lightseq", TORCH_WAYS[0])]
)
def test_backward_makes_no_attention_call_and_sends_nothing_for_one(method: str, way: str) -> None:
    for rank in results():
        found = rank[method, way, "keep_attention"]
        assert found["again"] == [(0, 0)] * STEPS
        assert found["losses"] == pytest.approx(unsharded(), rel=1e-6)


@pytest.mark.parametrize("way", ["torch, non-reentrant", "deepspeed"])
def test_ordinary_policy_makes_all_of_them_again(way: str) -> None:
    for rank in results():
        found = rank["ulysses", way, "full"]
        assert all(attention > 0 and sent > 0 for attention, sent in found["again"])
        assert found["losses"] == pytest.approx(unsharded(), rel=1e-6)


def test_checkpointing_keeps_attention_while_an_engine_asks_for_it() -> None:
    for rank in results():
        assert all(found["patched"] for found in rank.values())
        assert all(found["kept"] == (policy == "keep_attention") for (_, _, policy), found in rank.items())
        assert not any(found["kept after"] for found in rank.values())


def test_layers_that_transformers_checkpoints() -> None:
    pytest.importorskip("transformers")
    for rank in spawn(run_llama, WORLD, timeout=150):
        for reentrant in (True, False):
            assert rank[reentrant, "keep_attention"]["again"] == [(0, 0)] * STEPS
            assert rank[reentrant, "keep_attention"]["losses"] == pytest.approx(rank[None, "full"]["losses"], rel=1e-6)
        assert all(attention > 0 and sent > 0 for attention, sent in rank[False, "full"]["again"])


def _plain() -> dict[str, float]:
    """DeepSpeed's checkpoints inside routed modules that `parallelize` has sharded, without an engine."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(WORLD))
    config = SequenceParallelConfig(
        method="ring", size=WORLD, attention=["layers.*.attn"], batch=dict.fromkeys(batch(0), 1), loss={}, quiet=True
    )
    groups = SequenceParallelGroups.build(config)
    early = CausalLM().double()
    # Sharded before DeepSpeed is imported.
    parallelize(early, config=config, groups=groups)
    import deepspeed

    whole = CausalLM().double()
    whole(**batch(0)).backward()
    found = {}
    for way in ("deepspeed", "deepspeed, non-reentrant"):
        for name, model in (("sharded before", early), ("sharded after", CausalLM().double())):
            model.load_state_dict(whole.state_dict())
            model.zero_grad()
            for layer in model.layers:
                layer.attn.checkpointed = checkpoint_function(way, deepspeed)
            handle = None if model is early else parallelize(model, config=config, groups=groups)
            model(**batch(0)).backward()
            worst = 0.0
            for parameter, wanted in zip(model.parameters(), whole.parameters(), strict=True):
                dist.all_reduce(parameter.grad)
                difference = parameter.grad / WORLD - wanted.grad
                worst = max(worst, (difference.abs().max() / wanted.grad.abs().max()).item())
            found[f"{way}, {name}"] = worst
            if handle is not None:
                handle.remove()
    return found


def test_deepspeeds_checkpoints_are_exact_inside_modules_that_no_engine_has_sharded() -> None:
    for found in spawn(_plain, WORLD, timeout=150):
        assert len(found) == 4
        assert max(found.values()) < 1e-10, found
