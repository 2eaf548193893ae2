"""The plain `VisionTransformer` in one process, on the data of examples/pretrain_vit_core.py, and no Megatron."""

from __future__ import annotations

import torch
from megatron_runs import Run
from plain_training import BATCH, SEED, train, with_first_weights

from dsp_plugin.launch.examples.shallow_water import VARIABLES, ShallowWater, Weather, batch_of_some_variables
from dsp_plugin.models.vit import VisionTransformer
from dsp_plugin.models.vit_objective import VitObjective
from dsp_plugin.patches.megatron.models.vit_weights import draw

# Two samples of each weather, so that every step trains on the same four.
WEATHERS, SAMPLES, HOURS = 2, 2, 3.0


def plain_run(
    *,
    attention: str = "axial",
    rows: int,
    columns: int,
    registers: int = 0,
    classify: bool = False,
    lead_time: bool = False,
    times: int = 1,
    micro_batch: int = 1,
    depth: int = 4,
    width: int = 64,
    heads: int = 4,
    patch: int = 2,
    dumped: int = 0,
) -> Run:
    """Three steps of Adam, gradients clipped to norm 1; those of step `dumped` are kept.

    Every micro-batch has variables of its own, and a step has the mean of their losses.
    """
    model = VisionTransformer(
        len(VARIABLES),
        (patch, patch) if times == 1 else (1, patch, patch),
        width=width,
        heads=heads,
        depth=depth,
        attention=attention,  # type: ignore[arg-type]
        registers=registers,
        classes=WEATHERS if classify else 0,
        lead_time=lead_time,
    )
    with_first_weights(model, draw)
    water = ShallowWater(rows, columns)
    weather = Weather(water, WEATHERS, SAMPLES * times + 1, HOURS, seed=SEED)
    objective = VitObjective(model, torch.from_numpy(water.latitudes))

    def loss_of(step: int) -> torch.Tensor:
        parts = []
        for first in range(0, BATCH, micro_batch):
            samples = [sample_of(weather, times * index, times) for index in range(first, first + micro_batch)]
            batch = batch_of_some_variables(samples)
            if lead_time:
                batch["lead_time"] = torch.full((micro_batch,), HOURS / 24)
            if classify:
                batch["label"] = torch.stack([sample["index"] for sample in samples]) // (SAMPLES * times)
            parts.append(objective(**batch))
        return torch.stack(parts).mean()

    return train(model, loss_of, dumped)


def sample_of(weather: Weather, first: int, times: int) -> dict[str, torch.Tensor]:
    """One moment, or several as a dim of the grid."""
    if times == 1:
        return weather[first]
    moments = [weather[moment] for moment in range(first, first + times)]
    names = ("fields", "target")
    stacked = {name: torch.stack([moment[name] for moment in moments], dim=1) for name in names}
    return {**stacked, "index": moments[0]["index"]}
