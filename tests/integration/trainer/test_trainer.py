"""Scripts of Transformers' Trainer: the same with ranks that share sequences as without, by the section alone."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_cases import COVERING_LOOPS, COVERING_WRAPPED_LOOPS, LOOPS, WRAPPED_LOOPS
from safetensors.torch import load_file
from trainer_cases import COVERING, COVERING_DDP, DDP_SCRIPTS, READ_IN_TRAINING, SCRIPTS

ROOT = Path(__file__).parents[3]
# Ranks, and their section; the first of each pair is compared with as many ranks as it has replicas.
SHARDED = [(4, {"method": "ring", "size": 2}), (2, {"method": "ulysses", "size": 2})]
MATRIX = [(4, {"method": "usp", "size": 4, "ulysses_size": 2}), (3, {"method": "lightseq", "size": 3})]
# Logits exist in tiles, and are read in evaluation alone.
TILED = [(2, {"method": "ring", "size": 2, "memory": {"tile_tokens": 3}})]
# Without DeepSpeed the smaller world comes first: it holds the covering cases.
TOLD = SHARDED[::-1]
COUNTS = ("steps", "epoch", "tokens", "rates", "labelled")


def cells(sections: list[tuple[int, dict[str, Any]]], names: Iterable[str], covering: Collection[str]) -> list[Any]:
    """Each script under each section; the covering ones on the first of them, the rest with ``--matrix``."""
    found = []
    for place, (ranks, section) in enumerate(sections):
        for name in names:
            marks = [] if place == 0 and name in covering else [pytest.mark.matrix]
            found.append(pytest.param(name, ranks, section, marks=marks, id=_id(name, ranks, section)))
    return found


def _id(name: str, ranks: int, section: dict[str, Any]) -> str:
    return f"{name}-{ranks}-{section['method']}" + ("-tiled" if "memory" in section else "")


@pytest.mark.parametrize(
    ("name", "ranks", "section"),
    [
        *cells([*SHARDED, *MATRIX], SCRIPTS, COVERING),
        *cells(TILED, [name for name in SCRIPTS if name not in READ_IN_TRAINING], ()),
    ],
)
def test_a_script_comes_to_the_same(
    name: str, ranks: int, section: dict[str, Any], trainer_world: Callable[..., Any]
) -> None:
    """Under DeepSpeed, whose config has the section."""
    compare_scripts(name, trainer_world(ranks // section["size"], None), trainer_world(ranks, section))


@pytest.mark.parametrize(("name", "ranks", "section"), cells([*TOLD, *MATRIX], DDP_SCRIPTS, COVERING_DDP))
def test_a_script_on_ddp_comes_to_the_same(
    name: str, ranks: int, section: dict[str, Any], told_world: Callable[..., Any]
) -> None:
    alone, shared = told_world(ranks // section["size"], None), told_world(ranks, section)
    compare_scripts(name, alone, shared)
    # Which a launcher is whose section sharded no model.
    assert shared.failure is None


def compare_scripts(name: str, alone: Any, shared: Any) -> None:
    """Losses, norms, metrics, what was saved; and every count that is logged."""
    (expected, *_) = alone.results(name)
    for found in shared.results(name):
        for what in COUNTS:
            assert found.get(what) == expected.get(what), what
        assert found["operations"] == pytest.approx(expected["operations"], rel=1e-9)
        for what in ("losses", "unbroken", "norms", "evaluated", "predicted"):
            assert flat(found.get(what, [])) == pytest.approx(flat(expected.get(what, [])), rel=2e-5, abs=2e-5), what
        for what in ("losses", "evaluated"):
            assert found[what] == pytest.approx(expected[what], rel=1e-6), what
        assert found.get("metrics", {}) == pytest.approx(expected.get("metrics", {}), rel=1e-6)
        if {**SCRIPTS, **DDP_SCRIPTS}[name].save_at is not None:
            assert found["losses"] == pytest.approx(found["unbroken"], rel=1e-6)
    weights, wanted = (load_file(world.folder / name / "final" / "model.safetensors") for world in (shared, alone))
    assert weights.keys() == wanted.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, wanted[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "ranks", "section"), cells(SHARDED, LOOPS, COVERING_LOOPS))
def test_a_loop_on_accelerate_comes_to_the_same(
    name: str, ranks: int, section: dict[str, Any], trainer_world: Callable[..., Any]
) -> None:
    """Under DeepSpeed, whose config has the section."""
    compare_loops(name, trainer_world(ranks // section["size"], None), trainer_world(ranks, section))


@pytest.mark.parametrize(("name", "ranks", "section"), cells(TOLD, WRAPPED_LOOPS, COVERING_WRAPPED_LOOPS))
def test_a_loop_on_ddp_or_fsdp2_comes_to_the_same(
    name: str, ranks: int, section: dict[str, Any], told_world: Callable[..., Any]
) -> None:
    alone, shared = told_world(ranks // section["size"], None), told_world(ranks, section)
    compare_loops(name, alone, shared)
    # Which a launcher is whose section sharded no model.
    assert shared.failure is None


def compare_loops(name: str, alone: Any, shared: Any) -> None:
    """Losses, schedule, metrics in order; what is gathered, reduced and told between processes."""
    (expected, *_) = alone.results(name)
    for rank, found in enumerate(shared.results(name)):
        for what in ("labelled", "processes", "numbers", "shared", "summed", "writers", "told", "rate"):
            assert found[what] == expected[what], (rank, what)
        for what in ("losses", "unbroken"):
            assert found[what] == pytest.approx(expected[what], rel=1e-6), what
        assert flat(found["predicted"]) == pytest.approx(flat(expected["predicted"]), abs=2e-4)


@pytest.mark.parametrize(
    ("script", "config"), [("finetune_trainer.py", "trainer_ring_zero3.json"), ("sft_trl.py", "sft_ring_zero3.json")]
)
def test_all_that_a_user_changes_is_the_json(script: str, config: str) -> None:
    """The examples' code does not name us, and their JSON but for the section is what they have without us."""
    tree = ast.parse((ROOT / "launch" / "examples" / script).read_text())
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in named | imported | modules if "dsp" in name or "sequence_parallel" in name]
    changed = json.loads((ROOT / "configs" / "deepspeed" / config).read_text())
    assert set(changed.pop("sequence_parallel")) == {"method", "size"}
    assert all("sequence" not in key for key in changed)


def flat(values: Any) -> list[float]:
    """The numbers of nested lists."""
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]
