"""Runs in a world of 4 with sequence groups of 2, about what sequence peers share and what batch sizes count.

Each run returns what a test then judges; see `test_deepspeed_sharing.py`.
"""

from __future__ import annotations

import base64
import functools
import json
import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist
from causal_lm import CausalLM
from deepspeed_cases import ODD_LENGTH, Case, micro_batch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dsp_plugin import SequenceParallelBatchSampler
from dsp_plugin.errors import SequenceParallelConfigError

SIZE = 2
SAMPLES = 11
SIZES = {
    "train_and_micro": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2},
    "train_and_accumulation": {"train_batch_size": 8, "gradient_accumulation_steps": 2},
    "micro_and_accumulation": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    "all_three": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    "train_only": {"train_batch_size": 6},
    "micro_only": {"train_micro_batch_size_per_gpu": 3},
}
ROUTES = ("dict", "path", "base64", "args", "deepscale_args", "config_params", "positional", "taken_before_us")


class Numbered(Dataset[dict[str, torch.Tensor]]):
    """Sample i is filled with i, so a batch tells which samples it holds."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((ODD_LENGTH,), index)
        return {"input_ids": tokens, "position_ids": torch.arange(ODD_LENGTH), "labels": tokens}


def base_config(**overrides: Any) -> dict[str, Any]:
    """A config with the section and an optimizer, and `overrides` at the top level."""
    section = Case("lm", "ulysses", SIZE, 4, 1).section()
    given = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & overrides.keys()
    sizes = {} if given else {"train_micro_batch_size_per_gpu": 2}
    return {
        **sizes,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1000,
        "sequence_parallel": section,
        **overrides,
    }


def engine_of(config: Any, model: torch.nn.Module | None = None, **arguments: Any) -> Any:
    """A new engine."""
    return deepspeed.initialize(model=model or CausalLM(), config=config, **arguments)[0]


def sizes(given: dict[str, int]) -> dict[str, Any]:
    """What an engine says of its batch, before and after one optimizer step."""
    engine = engine_of(base_config(**given))
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(**micro_batch("lm", 0, engine.sequence_parallel_groups.dp.rank)))
        engine.step()
    return {
        "info": [value() for value in engine.get_batch_info()],
        "timer": engine.tput_timer.batch_size,
        "samples": engine.global_samples,
        "steps": engine.global_steps,
    }


def changed_sizes() -> dict[str, Any]:
    """The same, after the script changes them."""
    engine = engine_of(base_config(train_batch_size=4))
    engine.set_train_batch_size(12)
    train = [value() for value in engine.get_batch_info()]
    engine.set_train_micro_batch_size(5)
    try:
        engine.set_train_batch_size(11)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {"train": train, "micro": [value() for value in engine.get_batch_info()], "refused": refused}


def route(name: str, folder: Path) -> dict[str, Any]:
    """The config by one of the ways DeepSpeed takes it."""
    config = base_config()
    text = json.dumps(config)
    path = folder / f"config{dist.get_rank()}.json"
    path.write_text(text)
    initialize = functools.partial(deepspeed.initialize, model=CausalLM())
    arguments: dict[str, Any] = {
        "dict": {"config": config},
        "path": {"config": str(path)},
        "base64": {"config": base64.urlsafe_b64encode(text.encode()).decode()},
        "args": {"args": Namespace(deepspeed_config=str(path), local_rank=dist.get_rank())},
        "deepscale_args": {"args": Namespace(deepscale_config=str(path))},
        "config_params": {"config_params": config},
    }
    if name == "positional":
        engine, *_ = deepspeed.initialize(Namespace(deepspeed_config=str(path)), CausalLM())
    elif name == "taken_before_us":
        engine, *_ = deepspeed.initialize.__wrapped__(model=CausalLM(), config=config)
    else:
        engine, *_ = initialize(**arguments[name])
    return {
        "size": engine.sequence_parallel_config.size,
        "sp": engine.sequence_parallel_groups.sp.ranks,
        "dp": engine.sequence_parallel_groups.dp.ranks,
        "train": engine.train_batch_size(),
        "config_kept": "sequence_parallel" in engine.config,
    }


def training_data() -> dict[str, Any]:
    """The samples that each rank is given in one epoch, for training and for evaluation."""
    engine, _, loader, _ = deepspeed.initialize(model=CausalLM(), config=base_config(), training_data=Numbered())
    train = [batch["input_ids"][:, 0].tolist() for batch in loader]
    evaluation = engine.deepspeed_io(Numbered(), batch_size=3, route="eval")
    losses = [engine(**batch).item() for batch in list(loader)[:2]]
    return {
        "train": train,
        "eval": [batch["input_ids"][:, 0].tolist() for batch in evaluation],
        "batches": len(loader),
        "losses": losses,
        "world_kept": engine.dp_world_size,
    }


def wrong_loader() -> dict[str, Any]:
    """A loader that the script made for plain data parallelism."""
    engine = engine_of(base_config())
    sampler = DistributedSampler(Numbered(), dist.get_world_size(), dist.get_rank(), shuffle=False)
    try:
        engine(**next(iter(DataLoader(Numbered(), batch_size=2, sampler=sampler))))
    except SequenceParallelConfigError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def right_loader() -> dict[str, Any]:
    """A loader that the script made with the replica axis; then a different sample after the checked forwards."""
    engine = engine_of(base_config())
    dp = engine.sequence_parallel_groups.dp
    sampler = DistributedSampler(Numbered(), dp.size, dp.rank, shuffle=False)
    losses = []
    for batch in DataLoader(Numbered(), batch_size=2, sampler=sampler):
        losses.append(engine(**batch).item())
    return {"losses": losses}


def monitor(folder: Path) -> dict[str, Any]:
    """Two optimizer steps with DeepSpeed's CSV monitor on."""
    output = {"enabled": True, "output_path": str(folder), "job_name": "monitor"}
    engine = engine_of(base_config(train_batch_size=8, train_micro_batch_size_per_gpu=2, csv_monitor=output))
    for micro in range(4):
        engine.backward(
            engine(
                **micro_batch(
                    "lm", 0, micro * engine.sequence_parallel_groups.dp.size + engine.sequence_parallel_groups.dp.rank
                )
            )
        )
        engine.step()
    written = (folder / "monitor" / "Train_Samples_lr.csv").read_text() if dist.get_rank() == 0 else ""
    return {"csv": written}


def sampler_loader() -> dict[str, Any]:
    """A script's own loader with our sampler: two steps, then another loader that goes on from the engine's count."""
    engine = engine_of(base_config())

    def loader(trained: int) -> DataLoader[dict[str, torch.Tensor]]:
        sampler = SequenceParallelBatchSampler(
            SAMPLES,
            groups=engine.sequence_parallel_groups,
            global_batch_size=engine.train_batch_size(),
            micro_batch_size=engine.train_micro_batch_size_per_gpu(),
            seed=1,
            trained=trained,
        )
        return DataLoader(Numbered(), batch_sampler=sampler)

    whole = [batch["input_ids"][:, 0].tolist() for batch in loader(0)]
    losses = []
    for batch in list(loader(0))[:2]:
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    resumed = [batch["input_ids"][:, 0].tolist() for batch in loader(engine.global_samples)]
    return {"whole": whole, "resumed": resumed, "trained": engine.global_samples, "losses": losses}


def zero_init() -> dict[str, Any]:
    """A model built partitioned, from a config whose batch sizes only hold per replica."""
    config = base_config(train_batch_size=4, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1)
    config["zero_optimization"] = {"stage": 3}
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = CausalLM()
    engine = engine_of(config, model)
    loss = engine(**micro_batch("lm", 0, engine.sequence_parallel_groups.dp.rank))
    engine.backward(loss)
    engine.step()
    return {"loss": loss.item(), "train": engine.train_batch_size()}


def without_section() -> dict[str, Any]:
    """Upstream's own behaviour, with our patches in place."""
    config = base_config()
    del config["sequence_parallel"]
    model = CausalLM()
    engine = engine_of(config, model, training_data=Numbered())
    return {
        "groups": hasattr(engine, "sequence_parallel_groups") or hasattr(engine, "sequence_parallel_config"),
        "train": engine.train_batch_size(),
        "samples": [batch["input_ids"][:, 0].tolist() for batch in engine.training_dataloader],
        "forwards": sum("forward" in vars(module) for module in model.modules()),
        "communication": str(engine.communication_data_type),
    }


def random_state() -> dict[str, Any]:
    """Ranks seed by rank, train with dropout on shards of unequal size, and draw after it."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    random.seed(rank)
    numpy.random.seed(rank)
    engine = engine_of(base_config(), CausalLM(dropout=0.5))
    drawn = [torch.rand(()).item(), random.random(), float(numpy.random.rand())]
    batch = micro_batch("lm", 0, 0)
    losses = [engine(**batch).item() for _ in range(2)]
    engine.backward(engine(**batch))
    engine.step()
    losses.append(engine(**batch).item())
    return {"drawn": drawn, "losses": losses, "after": torch.rand(()).item()}


def buffers() -> dict[str, Any]:
    """A buffer that every rank drew for itself."""
    torch.manual_seed(dist.get_rank())
    return {"shift": engine_of(base_config()).module.shift.tolist()}


def communication() -> dict[str, Any]:
    """The data type in which bf16 gradients are averaged: ours by default, the user's if given."""
    bf16 = {"bf16": {"enabled": True}}
    default = engine_of(base_config(**bf16))
    chosen = engine_of(base_config(**bf16, communication_data_type="bf16"))
    return {"default": str(default.communication_data_type), "chosen": str(chosen.communication_data_type)}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All runs by name."""
    table: dict[str, Callable[[], dict[str, Any]]] = {
        f"sizes_{name}": functools.partial(sizes, given) for name, given in SIZES.items()
    }
    table |= {f"route_{name}": functools.partial(route, name, folder) for name in ROUTES}
    single = (
        changed_sizes,
        training_data,
        wrong_loader,
        right_loader,
        sampler_loader,
        zero_init,
        without_section,
        random_state,
        buffers,
    )
    table |= {run.__name__: run for run in (*single, communication)}
    table["monitor"] = functools.partial(monitor, folder)
    return table
