"""MLPs of Transformers' families in tiles beside the whole ones, and under DeepSpeed beside a run in one process."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import families
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from families import RESULTS, read
from hf_models import LENGTH, MICRO
from hf_tiled import COUNTED, COVERING, TILED, train_alone
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dsp_plugin import (
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    UnsupportedError,
)
from dsp_plugin.patches.transformers import ShardedCausalLM, tiny, trials
from dsp_plugin.patches.transformers.checks import checked_section
from dsp_plugin.patches.transformers.tiled_mlp import DROPOUT_RATES, KNOWN, TiledMLP, mlps_of, tile_mlps
from dsp_plugin.patches.transformers.tiled_norms import norms_of, tile_norms
from dsp_plugin.rehearsal.memory import StorageTracker
from dsp_plugin.verification.double import InDouble, backward

SECTION = {"method": "ring", "size": 2}
EXACT = sorted(
    {
        name
        for run in read(list(RESULTS.glob("*.json")))
        for name, entry in run["families"].items()
        if entry["status"] == "exact"
    }
    & set(families.names())
)
# Who has none: MLPs that are no modules of their own, and experts.
NONE = {
    *("bert", "bert-generation", "camembert", "ctrl", "data2vec-text", "electra", "ernie", "opt", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
EXPERTS = {
    *("cohere2_moe", "flex_olmo", "granitemoe", "granitemoeshared", "jetmoe", "mellum", "minimax_m2", "mixtral"),
    *("olmoe", "phimoe", "qwen3_moe"),
}
# Unlike Llama's: other projections, a list of MLPs, one that looks for three dims, shared experts.
COVERED = ("gpt2", "llama", "longcat_flash", "moshi", "qwen2_moe")
TILES = 3


def tiled_config(tiles: int | str = TILES, single: bool = False) -> SequenceParallelConfig:
    memory = tiles if tiles == "auto" else {"mlp_tiles": tiles}
    return SequenceParallelConfig(**SECTION | ({"size": 1} if single else {}), memory=memory)


def tiny_model(family: str, **changes: Any) -> Any:
    kind = getattr(transformers, families.names()[family])
    config = (kind.config_class or transformers.CONFIG_MAPPING[family])()
    settings = families.SETTINGS.get(family, {}) | ({"is_decoder": True} if hasattr(config, "is_decoder") else {})
    return tiny.random_model(kind, tiny.shrunk(config, **settings, **changes)).train()


def put(model: nn.Module, tiles: int | str = TILES) -> list[int]:
    """Has the MLPs tiled; returns where the tokens of every tile will be noted."""
    tile_mlps(model, tiled_config(tiles), lambda: False, ExitStack())
    sizes: list[int] = []
    for module in model.modules():
        standin = vars(module).get("forward")
        if standin is not None:
            note(standin._call, sizes)
    tile_norms(model, tiled_config(tiles), lambda: False, ExitStack())
    return sizes


def note(mlp: TiledMLP, sizes: list[int]) -> None:
    """Notes what the MLP's own forward gets."""
    upstream = mlp._upstream

    def noting(x: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(x[..., 0].numel())
        return upstream(x, *args, **kwargs)

    mlp._upstream = noting


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    # Norms are written out in fp32, whose rounding would differ with the shape of a tile.
    with InDouble():
        loss = model(**batch).loss
        backward(loss)
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in COVERED else pytest.mark.matrix) for f in EXACT if f not in NONE | EXPERTS],
)
def test_a_family(family: str) -> None:
    """Loss and every gradient, and that each MLP was computed in tiles, forward and again."""
    model = tiny_model(family)
    batch = trials.batches(model, "tokens")[0]
    tokens = batch["input_ids"].numel()
    wanted = gradients(deepcopy(model), batch)
    found_mlps = list(mlps_of(model))
    sizes = put(model)
    found = gradients(model, batch)
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        assert (found[name] - right).abs().max() <= 1e-10 * right.abs().max().clamp(min=1e-30), name
    size = -(-tokens // TILES)
    assert found_mlps
    assert sorted(sizes) == sorted([size, size, tokens - 2 * size] * 2 * len(found_mlps))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[] if f in ("bert", "mixtral") else pytest.mark.matrix)
        for f in EXACT
        if f in NONE | EXPERTS
    ],
)
def test_a_family_without(family: str) -> None:
    """It is named, and under "auto" left as it is."""
    model = tiny_model(family)
    why = "are experts" if family in EXPERTS else "no MLP is known"
    with pytest.raises(SequenceParallelConfigError, match=rf"memory.mlp_tiles=3.*{model.config.model_type}.*") as error:
        checked_section(model, {**SECTION, "unverified_model": True, "memory": {"mlp_tiles": TILES}})
    assert why in str(error.value)
    checked_section(model, {**SECTION, "unverified_model": True, "memory": "auto"})
    if next(norms_of(model), None) is None:
        return
    batch = trials.batches(model, "tokens")[0]
    wanted = gradients(deepcopy(model), batch)
    tile_norms(model, tiled_config(), lambda: False, ExitStack())
    found = gradients(model, batch)
    for name, right in wanted.items():
        assert (found[name] - right).abs().max() <= 1e-10 * right.abs().max().clamp(min=1e-30), name


def test_a_norm_in_tiles_keeps_its_input_alone() -> None:
    """Of what is written out in fp32 a tile's worth is alive, forward and backward."""
    model = tiny_model("llama").to(torch.bfloat16)
    norm = next(norms_of(model))
    tile_norms(model, tiled_config(64), lambda: False, ExitStack())
    x = torch.randn(1, 640, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with StorageTracker() as log:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = norm(x)
        out.backward(torch.ones_like(out))
    assert {t.untyped_storage().data_ptr() for t in kept} == {x.untyped_storage().data_ptr()}
    # What it returns, the gradient that comes, the input's, and ten tokens' worth of the rest.
    assert log.timeline.peak() < 4 * x.numel() * 2


@pytest.mark.matrix
def test_known_classes_are_those_of_the_families() -> None:
    """And which of them drop by a function is known, too."""
    seen = {type(mlp) for family in EXACT for mlp in mlps_of(tiny_model(family))}
    assert {kind.__name__ for kind in seen} == KNOWN
    for kind in seen:
        rates = re.findall(r"functional\.dropout\([^)]*p=self\.(\w+)", inspect.getsource(kind))
        assert set(rates) <= set(DROPOUT_RATES), kind


def llama(**changes: Any) -> Any:
    return tiny_model("llama", **changes)


def adapted(kind: type[Any], **settings: Any) -> Any:
    return peft.get_peft_model(llama(), kind(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings))


DRAWING: dict[str, tuple[Callable[[], Any], float]] = {
    "a module": (lambda: tiny_model("gpt2", resid_pdrop=0.1), 0.1),
    "a function": (lambda: tiny_model("starcoder2", residual_dropout=0.2), 0.2),
    "LoRA's": (lambda: adapted(peft.LoraConfig, lora_dropout=0.3), 0.3),
    "LoKr's": (lambda: adapted(peft.LoKrConfig, module_dropout=0.4), 0.4),
    "OFT's": (lambda: adapted(peft.OFTConfig, r=0, oft_block_size=4, module_dropout=0.25), 0.25),
}


@pytest.mark.parametrize("name", DRAWING)
def test_what_drops_is_refused(name: str) -> None:
    """Before the first step; under "auto" it is left whole while it trains."""
    build, rate = DRAWING[name]
    model = build()
    with pytest.raises(SequenceParallelConfigError, match=rf"memory.mlp_tiles=3.*at a rate of {rate}"):
        checked_section(model, {**SECTION, "memory": {"mlp_tiles": TILES}})
    checked_section(model, {**SECTION, "memory": "auto"})


def test_what_drops_only_later_is_refused_then() -> None:
    model = tiny_model("gpt2")
    put(model)
    batch = trials.batches(model, "tokens")[0]
    model.transformer.h[1].mlp.dropout.p = 0.1
    with pytest.raises(UnsupportedError, match=r"memory.mlp_tiles=3.*GPT2MLP drops features at a rate of 0.1"):
        model(**batch)
    model.eval()(**batch)


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole where it is small; else as few tiles as do, of what three times the projections' outputs take."""
    model = llama()
    sizes = put(model, "auto")
    batch = trials.batches(model, "tokens")[0]
    tokens = batch["input_ids"].numel()
    mlp = model.model.layers[0].mlp
    of_token = 3 * (2 * mlp.up_proj.out_features + mlp.down_proj.out_features) * 8
    wanted = model(**batch).loss
    assert sizes == [tokens] * 2
    sizes.clear()
    monkeypatch.setattr("dsp_plugin.patches.transformers.tiled_mlp.AUTO_MLP_BYTES", 10 * of_token)
    assert torch.allclose(model(**batch).loss, wanted, rtol=1e-12)
    assert sizes == [10, 10, 10, 10, tokens - 40] * 2


def test_auto_leaves_whole_what_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2", resid_pdrop=0.1)
    sizes = put(model, "auto")
    monkeypatch.setattr("dsp_plugin.patches.transformers.tiled_mlp.AUTO_MLP_BYTES", 1)
    batch = trials.batches(model, "tokens")[0]
    tokens = batch["input_ids"].numel()
    model(**batch)
    assert set(sizes) == {tokens}
    sizes.clear()
    model.eval()(**batch)
    assert set(sizes) == {1}


def test_generation_copies_and_removal_are_the_models_own() -> None:
    model = llama()
    sharded = ShardedCausalLM(model, tiled_config(single=True), SequenceParallelGroups.single())
    sizes: list[int] = []
    for layer in model.model.layers:
        note(vars(layer.mlp)["forward"]._call, sizes)
    batch = trials.batches(model, "tokens")[0]
    tokens = batch["input_ids"].numel()
    model(**batch)
    assert max(sizes) == -(-tokens // TILES)
    sizes.clear()
    model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    assert sorted(sizes) == [len(batch["input_ids"])] * 2 + [tokens] * 2
    sizes.clear()
    deepcopy(model)(**batch)
    sharded.remove()
    model(**batch)
    assert sizes == []
    assert not any("forward" in vars(module) for module in model.modules())
    alive = weakref.ref(model)
    del model, sharded, layer
    gc.collect()
    assert alive() is None


@pytest.mark.matrix
def test_compiled_models_compute_tiles_as_they_are() -> None:
    model = llama()
    batch = trials.batches(model, "tokens")[0]
    wanted = gradients(deepcopy(model), batch)
    sizes = put(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    found = gradients(model, batch)
    assert max(sizes) == -(-batch["input_ids"].numel() // TILES)
    for name, right in wanted.items():
        assert (found[name] - right).abs().max() <= 1e-10 * right.abs().max(), name


def test_weights_that_are_gathered_within_are_refused() -> None:
    """As `fully_shard` on projections has it; on a mesh of one rank here."""
    model = llama()
    put(model)
    with single_rank():
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model.model.layers[1].mlp.up_proj, mesh=mesh)
        with pytest.raises(UnsupportedError, match=r"LlamaMLP=3: this rank has a part of up_proj.weight.*fully_shard"):
            model(**trials.batches(model, "tokens")[0])


@contextmanager
def single_rank() -> Iterator[None]:
    """A world of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def covering(names: Iterable[str]) -> list[Any]:
    """As parameters; those beyond the covering subset run with ``--matrix``."""
    return [pytest.param(name, marks=() if name in COVERING else pytest.mark.matrix) for name in names]


@pytest.mark.parametrize("name", covering(TILED))
def test_training_equals_the_unsharded_run(name: str, hf_world: Callable[..., Any]) -> None:
    """Losses of every step and every gradient of the first, under ZeRO 0 to 3, and that MLPs are in tiles."""
    world = hf_world(2, "living")
    expected, results = train_alone(TILED[name]), world.results(f"tiled-{name}")
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx(expected.losses, rel=1e-6)
        local = MICRO * (LENGTH // 2 + (1 if rank == 0 else 0))
        assert max(result["sizes"]) == -(-local // 3)
    gradients = torch.load(world.folder / f"tiled-{name}.pt")
    assert gradients.keys() == expected.gradients.keys()
    for parameter, gradient in expected.gradients.items():
        error = (gradients[parameter] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, f"{parameter}: {error:.1e}"


@pytest.mark.parametrize("name", covering(COUNTED))
def test_zero_3_gathers_no_more(name: str, hf_world: Callable[..., Any]) -> None:
    """Around an MLP's call and its backward pass, all its weights at once: no more elements, in fewer collectives."""
    world = hf_world(2, "living")
    for tiled, whole in zip(world.results(f"tiled-{name}"), world.results(f"whole-{name}"), strict=True):
        assert tiled["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        for (calls, elements), (of_whole, elements_of_whole) in zip(tiled["gathered"], whole["gathered"], strict=True):
            assert 0 < calls < of_whole
            assert elements <= elements_of_whole
