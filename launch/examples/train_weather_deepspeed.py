r"""Trains a vision transformer on simulated weather with DeepSpeed, and forecasts with it: a user's script.

    torchrun --nproc-per-node 2 -m dsp_plugin.launch launch/examples/train_weather_deepspeed.py \
        --deepspeed_config configs/deepspeed/weather_dsp_zero2.json --plots-out forecast.png

It shards nothing: the JSON's "sequence_parallel" section does, by a method and a size, from the pixels of the fields to
the predictions. Without the section the same file trains on one rank or with data parallelism. Every batch brings other
variables. On a machine without a GPU, set DS_ACCELERATOR=cpu.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import numpy as np
import torch

from dsp_plugin.launch.examples.deepspeed_training import argument_parser, train
from dsp_plugin.launch.examples.shallow_water import (
    CHANGING,
    PROGNOSTIC,
    VARIABLES,
    ShallowWater,
    Weather,
    add_arguments,
    batch_of_some_variables,
)
from dsp_plugin.models.vit import VisionTransformer
from dsp_plugin.models.vit_objective import VitObjective, latitude_weights


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, steps=500, width=128)
    add_arguments(parser, patch=4, weathers=12)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--days", type=float, default=4.0, help="length of each weather")
    parser.add_argument("--forecast-steps", type=int, default=8, help="predictions from one another in a forecast")
    parser.add_argument("--plots-out", type=Path, help="write truth, forecast and error to this PNG")
    return parser.parse_args()


@torch.no_grad()
def forecast(engine: Any, weather: Weather, steps: int, variables: torch.Tensor) -> torch.Tensor:
    """Scaled fields [states, steps, V, Y, X] on the CPU, from the first moment of each state and then each other.

    All ranks must call it: they may hold parts of the weights and of the tokens.
    """
    engine.eval()
    ids = variables.to(engine.device)
    wanted = ids[ids < CHANGING]
    unit = torch.from_numpy(weather.scale.change / weather.scale.deviation[:CHANGING]).float().to(engine.device)
    now = weather.fields[:, 0, variables].to(engine.device)
    moments = []
    for _ in range(steps):
        change = engine.module.model(now, ids, wanted).float()
        now = now.clone()
        now[:, ids < CHANGING] += change * unit[wanted][:, None, None]
        moments.append(now.cpu())
    return torch.stack(moments, dim=1)


def errors(fields: torch.Tensor, truth: torch.Tensor, weather: Weather, water: ShallowWater) -> np.ndarray:
    """Root mean square errors [steps, 3] of depth in m and winds in m/s; rows count by their area."""
    weight = latitude_weights(torch.from_numpy(water.latitudes))[:, None]
    difference = (fields[:, :, :PROGNOSTIC] - truth[:, :, :PROGNOSTIC]).double()
    squares = (difference.square() * weight).mean((0, 3, 4)).sqrt()
    return squares.numpy() * weather.scale.deviation[:PROGNOSTIC]


def plot(
    predicted: torch.Tensor, truth: torch.Tensor, weather: Weather, water: ShallowWater, hours: float, path: Path
) -> None:
    """Writes truth, forecast and error of one state's vorticity: a row each, moments from left to right.

    Args:
        predicted: scaled fields [steps, V, Y, X], with vorticity where `VARIABLES` has it.
        truth: the same.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    place = VARIABLES.index("vorticity")
    scale = weather.scale
    wanted, found = (
        1e5 * (x[:, place].numpy() * scale.deviation[place] + scale.mean[place]) for x in (truth, predicted)
    )
    shown = np.unique(np.linspace(0, len(wanted) - 1, 4).round().astype(int))
    limit = np.abs(wanted).max() * 0.7
    figure, panels = pyplot.subplots(
        3, len(shown), figsize=(3.6 * len(shown), 6.2), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    extent = (0.0, water.sector, water.south, water.north)
    for column, step in enumerate(shown):
        rows = {"truth": wanted[step], "forecast": found[step], "error": found[step] - wanted[step]}
        for panel, (name, values) in zip(panels[:, column], rows.items(), strict=True):
            image = panel.imshow(
                values, origin="lower", extent=extent, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit
            )
            panel.set_title(f"{name}, {hours * (step + 1):g} h", fontsize=10)
    for panel in panels[:, 0]:
        panel.set_ylabel("latitude")
    for panel in panels[-1]:
        panel.set_xlabel("longitude")
    figure.colorbar(image, ax=panels, label="vorticity, 1e-5 / s", shrink=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(skill: dict[str, np.ndarray], hours: float) -> None:
    """Prints errors by lead time beside those of persistence, the forecast that nothing changes."""
    print("root mean square error: depth in m, winds in m/s; in brackets that of persistence")
    for step, (own, still) in enumerate(zip(skill["forecast"], skill["persistence"], strict=True)):
        pairs = zip(VARIABLES[:PROGNOSTIC], own, still, strict=True)
        print(
            f"{hours * (step + 1):5g} h  " + "  ".join(f"{name} {a:.2f} ({b:.2f})" for name, a, b in pairs), flush=True
        )


def main() -> None:
    """Trains, then writes what was asked for."""
    args = parse_arguments()
    deepspeed.init_distributed()
    water = ShallowWater(args.rows, args.columns)
    moments = int(24 * args.days / args.hours) + 1
    training = Weather(water, args.weathers, moments, args.hours, seed=2 * args.seed)
    unseen = Weather(water, 4, args.forecast_steps + 1, args.hours, seed=2 * args.seed + 1, scale=training.scale)

    torch.manual_seed(args.seed)
    model = VisionTransformer(
        len(VARIABLES),
        (args.patch, args.patch),
        width=args.width,
        heads=args.heads,
        depth=args.depth,
        attention=args.attention,
        registers=args.registers,
    )
    objective = VitObjective(model, torch.from_numpy(water.latitudes))
    engine, _, loader, _ = deepspeed.initialize(
        model=objective,
        model_parameters=objective.parameters(),
        training_data=training,
        collate_fn=batch_of_some_variables,
        config=str(args.deepspeed_config),
    )
    tokens = (args.rows // args.patch) * (args.columns // args.patch)
    history = train(engine, loader, args, tokens)

    predicted = forecast(engine, unseen, args.forecast_steps, torch.arange(len(VARIABLES)))
    if dist.get_rank() == 0:
        truth = unseen.fields[:, 1:]
        still = unseen.fields[:, :1].expand_as(truth)
        skill = {
            "forecast": errors(predicted, truth, unseen, water),
            "persistence": errors(still, truth, unseen, water),
        }
        report(skill, args.hours)
        if args.metrics_out is not None:
            history.write(args.metrics_out, **{name: values.tolist() for name, values in skill.items()})
        if args.plots_out is not None:
            plot(predicted[0], truth[0], unseen, water, args.hours, args.plots_out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
