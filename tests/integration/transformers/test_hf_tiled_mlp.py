"""MLPs of Transformers' families in tiles beside the whole ones, and under DeepSpeed beside a run in one process."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import families
import pytest
import torch
import transformers
from families import RESULTS, read
from hf_models import LENGTH, MICRO
from hf_tiled import COUNTED, COVERING, TILED, train_alone
from torch import nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.patches.transformers import tiny, trials
from dsp_plugin.patches.transformers.checks import checked_section
from dsp_plugin.patches.transformers.tiled_mlp import DROPOUT_RATES, KNOWN, TiledMLP, mlps_of, tile_mlps

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


def tiled_config(tiles: int | str = TILES) -> SequenceParallelConfig:
    memory = tiles if tiles == "auto" else {"mlp_tiles": tiles}
    return SequenceParallelConfig(**SECTION, memory=memory)


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
    return sizes


def note(mlp: TiledMLP, sizes: list[int]) -> None:
    """Notes what the MLP's own forward gets."""
    upstream = mlp._upstream

    def noting(x: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(x[..., 0].numel())
        return upstream(x, *args, **kwargs)

    mlp._upstream = noting


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    loss = model(**batch).loss
    loss.backward()
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


@pytest.mark.matrix
def test_known_classes_are_those_of_the_families() -> None:
    """And which of them drop by a function is known, too."""
    seen = {type(mlp) for family in EXACT for mlp in mlps_of(tiny_model(family))}
    assert {kind.__name__ for kind in seen} == KNOWN
    for kind in seen:
        rates = re.findall(r"functional\.dropout\([^)]*p=self\.(\w+)", inspect.getsource(kind))
        assert set(rates) <= set(DROPOUT_RATES), kind


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
