"""Two ranks that save two checkpoints, harm the last in every way, and load it by ``latest`` and by its tag.

    checkpoint_faults.py FOLDER

FOLDER/loaded.RANK.json says for each harm what either load took (a tag) or raised, and what the saves left.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed_cases import Case, parameters_optimizer

import dsp_plugin
from dsp_plugin.training.checkpoint import FILE as RECORD
from dsp_plugin.training.manifest import FILE, Manifest

MODEL, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
FIRST, LAST = "global_step1", "global_step2"


def swap(folder: Path) -> None:
    """Two ranks' shards in each other's place."""
    (folder / SHARD.format(0)).rename(folder / "between")
    (folder / SHARD.format(1)).rename(folder / SHARD.format(0))
    (folder / "between").rename(folder / SHARD.format(1))


def change(path: Path) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "swapped": swap,
    "cut": lambda folder: os.truncate(folder / SHARD.format(1), 1000),
    "model cut": lambda folder: os.truncate(folder / MODEL, 1000),
    "missing": lambda folder: (folder / SHARD.format(1)).unlink(),
    "changed": lambda folder: change(folder / SHARD.format(0)),
    "of another step": lambda folder: shutil.copy(folder.parent / FIRST / SHARD.format(1), folder),
    "one too many": lambda folder: shutil.copy(folder / SHARD.format(1), folder / SHARD.format(2)),
    "unfinished": lambda folder: Manifest(step=2).write(folder),
    "list unreadable": lambda folder: (folder / FILE).write_text("{"),
    "record unreadable": lambda folder: (folder / RECORD).write_text("{"),
    "no list": lambda folder: (folder / FILE).unlink(),
    "no list, cut": lambda folder: ((folder / FILE).unlink(), os.truncate(folder / SHARD.format(1), 1000)),
    "no folder": shutil.rmtree,
    "latest empty": lambda folder: (folder.parent / "latest").write_text(""),
    "no other": lambda folder: ((folder.parent / FIRST / FILE).unlink(), os.truncate(folder / MODEL, 1000)),
}


class Decoupled(TorchCheckpointEngine):
    """Writes when it is told that training goes on, the second rank late."""

    def __init__(self) -> None:
        super().__init__()
        self.info: Any = None
        self.waiting: list[tuple[Any, str]] = []

    def is_decoupled(self) -> bool:
        """Yes."""
        return True

    def create(self, info: Any) -> None:
        """Begins a save."""
        self.info = info

    def get_commit_info(self) -> Any:
        """The save that has begun."""
        return self.info

    def save(self, state_dict: Any, path: str) -> None:
        """Not yet."""
        self.waiting.append((state_dict, path))

    def commit(self, info: Any) -> bool:
        """Ends the save."""
        assert info == self.info
        time.sleep(dist.get_rank())
        for state_dict, path in self.waiting:
            super().save(state_dict, path)
        self.info, self.waiting = None, []
        return True


def loaded(engine: Any, root: Path, **how: Any) -> str:
    """The tag whose files the engine takes, or the error."""
    try:
        path, _ = engine.load_checkpoint(str(root), **how)
    except dsp_plugin.SequenceParallelConfigError as error:
        return f"{type(error).__name__}: {error}"
    return str(path and Path(path).parent.name)


def at_latest(root: Path) -> list[bool]:
    """Whether the second rank's shard was there whole, whenever ``latest`` was put in its place from here on."""
    seen: list[bool] = []
    replace = os.replace

    def watching(source: Any, target: Any) -> None:
        if Path(target) == root / "latest":
            shard = root / Path(source).read_text() / SHARD.format(1)
            seen.append(shard.is_file() and torch.load(shard, weights_only=False) is not None)
        replace(source, target)

    os.replace = watching
    return seen


def build(zero: int) -> Any:
    """An engine over both ranks; the weights are always the same."""
    torch.manual_seed(0)
    case = Case("even_lm", "ulysses", 2, 2, zero)
    model = case.build()
    optimizer = parameters_optimizer(case, model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())[0]


def step(engine: Any) -> None:
    """One optimizer step."""
    case = Case("even_lm", "ulysses", 2, 2, engine.zero_optimization_stage())
    engine.backward(case.loss(engine, case.batch(engine.global_steps, 0, 0)))
    engine.step()


def weights(engine: Any) -> float:
    """Tells one set of weights from another."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return sum(float(parameter.double().square().sum()) for parameter in parameters)


def weights_of_zero3(root: Path) -> dict[str, Any]:
    """The weights that are saved, at both steps, and those that loads without the optimizer's states take."""
    engine, saved = build(3), []
    for _ in range(2):
        step(engine)
        engine.save_checkpoint(str(root))
        saved.append(weights(engine))
    found = {}
    for setting, value in (("load_optimizer_states", False), ("load_module_only", True)):
        engine = build(3)
        engine.load_checkpoint(str(root), tag=FIRST, **{setting: value})
        found[setting] = weights(engine)
    return {"saved": saved, **found}


def main() -> None:
    """See above."""
    folder = Path(sys.argv[1])
    engine = build(1)
    good, results = folder / "good", {}
    seen = at_latest(good)
    for _ in range(2):
        step(engine)
        if dist.get_rank() == 0 and engine.global_steps == 2:
            (good / LAST).mkdir()
            (good / LAST / SHARD.format(5)).write_text("left by a run of more ranks")
        engine.save_checkpoint(str(good))
    engine.save_checkpoint(str(good), tag="side", save_latest=False)
    for name, harm in HARMS.items():
        root = folder / name.replace(" ", "_")
        if dist.get_rank() == 0:
            shutil.copytree(good, root)
            harm(root / LAST)
        dist.barrier()
        results[name] = loaded(engine, root), loaded(engine, root, tag=LAST)
    weights_alone = loaded(engine, folder / "missing", tag=LAST, load_optimizer_states=False)
    results["weights alone"] = weights_alone, loaded(engine, folder / "nowhere")

    aside = folder / "aside"
    engine.checkpoint_engine = Decoupled()
    seen_aside = at_latest(aside)
    engine.save_checkpoint(str(aside), tag="beside")
    named_early = (aside / "latest").exists()
    step(engine)
    results["saves"] = {
        "shards at latest": seen,
        "shards at latest beside training": seen_aside,
        "named early": named_early,
        "files": sorted(path.name for path in (good / LAST).iterdir()),
        "loaded": loaded(engine, aside),
    }
    engine._config.load_universal_checkpoint = True
    results["universal"] = loaded(engine, folder / "no_folder", tag=LAST), loaded(engine, folder / "nothing")
    results["zero 3"] = weights_of_zero3(folder / "zero3")
    (folder / f"loaded.{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
