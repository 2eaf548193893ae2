"""Scripts of TRL: the same with ranks that share sequences as without, or refused on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl_cases import COVERING, HEAD, SCRIPTS

ROOT = Path(__file__).parents[3]
EXAMPLE, JSON = ROOT / "launch" / "examples" / "sft_trl.py", ROOT / "configs" / "deepspeed" / "sft_ring_zero3.json"
# Ranks, and their section; each is compared with as many ranks as it has replicas.
SHARDED = [(2, {"method": "ring", "size": 2})]
MATRIX = [(4, {"method": "ulysses", "size": 2})]
# What a log says of time, and not of the model.
TIMES = ("runtime", "per_second", "step_time")
REASONS = {"sft_short": "would hold none of so short a sequence"}


def cells() -> list[Any]:
    """Each script under each section; the covering ones on the first of them, the rest with ``--matrix``."""
    found = []
    for place, (ranks, section) in enumerate([*SHARDED, *MATRIX]):
        for name in SCRIPTS:
            marks = [] if place == 0 and name in COVERING else [pytest.mark.matrix]
            found.append(pytest.param(name, ranks, section, marks=marks, id=f"{name}-{ranks}-{section['method']}"))
    return found


@pytest.mark.parametrize(("name", "ranks", "section"), cells())
def test_a_script_comes_to_the_same(
    name: str, ranks: int, section: dict[str, Any], trl_world: Callable[..., Any]
) -> None:
    """Everything that is logged but times, and what was saved."""
    alone, shared = trl_world(ranks // section["size"], None), trl_world(ranks, section)
    (expected, *_) = alone.results(name)
    for found in shared.results(name):
        assert found["steps"] == expected["steps"]
        for entry, wanted in zip(found["log"], expected["log"], strict=True):
            assert losses(entry) == pytest.approx(losses(wanted), rel=1e-6)
            # Of a norm, which small differences of large rewards went into.
            norms = [numbers(line).pop("grad_norm", 0.0) for line in (entry, wanted)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-4)
            found_numbers, wanted_numbers = ({**numbers(line), "grad_norm": 0.0} for line in (entry, wanted))
            assert found_numbers == pytest.approx(wanted_numbers, rel=2e-6, abs=1e-5)
    weights, wanted = (saved(world.folder / name) for world in (shared, alone))
    assert weights.keys() == wanted.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, wanted[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REASONS)
def test_a_script_is_refused_on_every_rank(name: str, trl_world: Callable[..., Any]) -> None:
    """In one line, with the reason."""
    ranks, section = SHARDED[0]
    for found in trl_world(ranks, section).results(name):
        assert REASONS[name] in found["message"]
        assert "\n" not in found["message"]


def test_the_head_returns_whole_sequences(trl_world: Callable[..., Any]) -> None:
    """Whatever it is asked for, with gradients of the loss and of entropies."""
    ranks, section = SHARDED[0]
    for found in trl_world(ranks, section).results(HEAD):
        assert len(found) == 3 * 8
        assert max(found.values()) < 2e-5, found


def losses(entry: dict[str, float]) -> dict[str, float]:
    """Of one line of a log."""
    return {name: value for name, value in entry.items() if name.endswith("loss")}


def numbers(entry: dict[str, float]) -> dict[str, float]:
    """Of one line of a log: sums of log-probabilities taken from each other, too, hence the absolute tolerance."""
    # Of a policy that still is the reference, rounding decides which of two rewards is the greater.
    undecided = any("margins" in name and abs(value) < 1e-4 for name, value in entry.items())
    left_out = (*TIMES, *(("accuracies",) if undecided else ()))
    return {name: value for name, value in entry.items() if not any(part in name for part in left_out)}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Of the weights that a script wrote."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.matrix
def test_the_example_trains_by_its_json(tmp_path: Path) -> None:
    """The shipped script under the shipped JSON, and without the section on one rank: the same weights."""
    from deepspeed_world import run_launcher

    section = json.loads(JSON.read_text())
    (tmp_path / "plain.json").write_text(json.dumps({key: section[key] for key in section if "sequence" not in key}))
    options = "--max_steps 3 --packing --max_length 64 --bf16 false --optim sgd --learning_rate 0.3 --report_to none"
    for ranks, config in ((1, tmp_path / "plain.json"), (2, JSON)):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = ["-m", "dsp_plugin.launch", str(EXAMPLE), "--deepspeed", str(config), *options.split()]
        run_launcher([*torchrun, *script, "--output_dir", str(tmp_path / str(ranks))], ranks, tmp_path, 300)
    expected, found = saved(tmp_path / "1"), saved(tmp_path / "2")
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-5)
