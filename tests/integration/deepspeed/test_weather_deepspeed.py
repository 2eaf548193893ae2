"""The vision transformer on simulated weather under DeepSpeed: sharded by a method and a size, it trains and forecasts
as one process does. The worker imports this file, too, for what its ranks run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_world import run_launcher, run_ranks
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from dsp_plugin import SequenceParallelConfig
from dsp_plugin.launch.examples.shallow_water import VARIABLES, ShallowWater, Weather, batch_of_some_variables
from dsp_plugin.models.vit import VisionTransformer
from dsp_plugin.models.vit_objective import VitObjective

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CONFIGS = {path.stem: path for path in (ROOT / "configs" / "deepspeed").glob("weather_*.json")}
ATTENTION = {"weather_dsp_zero2": "axial", "weather_ulysses_zero3": "full"}
STEPS, LEADS, RANKS = 4, 3, 2
# 5 x 7 patches, and with the registers 37 tokens in one sequence: two ranks divide neither.
WATER = ShallowWater(rows=10, columns=14)
OPTIMIZER = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}
CLIPPING = 0.5


def build(attention: str) -> VitObjective:
    """The model with its first weights."""
    torch.manual_seed(4)
    registers = 2 if attention == "full" else 0
    model = VisionTransformer(
        len(VARIABLES), (2, 2), width=16, heads=2, depth=2, attention=attention, registers=registers
    )
    return VitObjective(model, torch.from_numpy(WATER.latitudes))


@cache
def weather() -> Weather:
    """The data."""
    return Weather(WATER, states=2, times=9, seed=1)


def config_of(name: str) -> dict[str, Any]:
    """The committed config, for a short run that is easy to follow."""
    config = json.loads(CONFIGS[name].read_text())
    del config["scheduler"]
    optimizer = {"type": "AdamW", "params": {**OPTIMIZER, "torch_adam": True}}
    return {**config, "train_batch_size": 4, "gradient_clipping": CLIPPING, "optimizer": optimizer}


def train(name: str, folder: Path) -> dict[str, Any]:
    """What a rank does: the calls of the script."""
    import deepspeed

    import dsp_plugin
    from dsp_plugin.launch.examples.train_weather_deepspeed import forecast

    objective = build(ATTENTION[name])
    engine, _, loader, _ = deepspeed.initialize(
        model=objective,
        model_parameters=objective.parameters(),
        training_data=weather(),
        collate_fn=batch_of_some_variables,
        config=config_of(name),
    )
    losses, shapes = [], []
    for _, batch in zip(range(STEPS), loader, strict=False):
        with dsp_plugin.ledger() as log:
            loss = engine(**batch)
            engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        shapes.append(len(batch["variables"]))
    with dsp_plugin.ledger() as forecasting:
        fields = forecast(engine, weather(), LEADS, torch.arange(len(VARIABLES)))
    torch.save(fields, folder / f"{name}.forecast.pt")
    engine.destroy()
    return {
        "losses": losses,
        "shapes": shapes,
        "sent": log.bytes(),
        "sent_forecasting": forecasting.bytes(),
        "batch": engine.train_batch_size(),
    }


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What the worker runs."""
    return {name: partial(train, name, folder) for name in ATTENTION}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a world of two ranks."""
    folder = tmp_path_factory.mktemp("weather")
    run_ranks([str(HERE / "deepspeed_worker.py"), str(folder), "test_weather_deepspeed"], RANKS, folder, 150)
    return folder


def expected(attention: str) -> tuple[list[float], Tensor]:
    """Losses and forecast of one process without DeepSpeed."""
    objective, data = build(attention), weather()
    loader = DataLoader(
        data,
        batch_size=4,
        sampler=DistributedSampler(data, num_replicas=1, rank=0),
        collate_fn=batch_of_some_variables,
    )
    optimizer = torch.optim.AdamW(objective.parameters(), **OPTIMIZER)
    losses = []
    for _, batch in zip(range(STEPS), loader, strict=False):
        loss = objective(**batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), CLIPPING)
        optimizer.step()
        losses.append(loss.item())
    unit = torch.from_numpy(data.scale.change / data.scale.deviation[:5]).float()[:, None, None]
    now, moments = data.fields[:, 0], []
    with torch.no_grad():
        for _ in range(LEADS):
            change = objective.model(now, torch.arange(6), torch.arange(5))
            now = torch.cat([now[:, :5] + unit * change, now[:, 5:]], dim=1)
            moments.append(now)
    return losses, torch.stack(moments, dim=1)


@pytest.mark.parametrize("name", ATTENTION)
def test_training_and_forecast_equal_those_of_one_process(name: str, folder: Path) -> None:
    """Every batch brings other variables; all peers see one loss and the whole forecast."""
    losses, fields = expected(ATTENTION[name])
    for rank in range(RANKS):
        result = json.loads((folder / f"{name}.rank{rank}.json").read_text())
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        assert len(set(result["shapes"])) > 1
        assert result["sent"] > 0
        assert result["sent_forecasting"] > 0
        assert result["batch"] == 4
    torch.testing.assert_close(torch.load(folder / f"{name}.forecast.pt"), fields, rtol=0, atol=1e-4)


def test_the_script_trains_forecasts_and_plots(tmp_path: Path) -> None:
    """As a user starts it, on little data; its report has an error and that of persistence at every lead time."""
    plot, metrics = tmp_path / "plots" / "forecast.png", tmp_path / "metrics.json"
    sizes = ["--rows", "12", "--columns", "20", "--width", "16", "--depth", "1", "--weathers", "2", "--days", "1"]
    log = run_launcher(
        [
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dsp_plugin.launch"),
            *(
                str(ROOT / "launch" / "examples" / "train_weather_deepspeed.py"),
                *sizes,
                "--steps",
                "2",
                "--forecast-steps",
                "2",
            ),
            *("--deepspeed_config", str(CONFIGS["weather_dsp_zero2"])),
            *("--plots-out", str(plot), "--metrics-out", str(metrics)),
        ],
        2,
        tmp_path,
        120,
    )
    found = json.loads(metrics.read_text())
    assert len(found["losses"]) == 2
    for kind in ("forecast", "persistence"):
        assert len(found[kind]) == 2
        assert all(0 < error < 1000 for moment in found[kind] for error in moment)
    assert plot.stat().st_size > 10_000
    assert "6 h  depth" in log.read_text()


def test_configs_are_legal_and_name_nothing_but_a_method_and_a_size() -> None:
    """The stages are ZeRO's of the files' names."""
    assert set(CONFIGS) == set(ATTENTION)
    for name, path in CONFIGS.items():
        config = json.loads(path.read_text())
        section = SequenceParallelConfig.from_deepspeed(config)
        assert section is not None
        assert name == f"weather_{section.method}_zero{config['zero_optimization']['stage']}"
        assert config["sequence_parallel"] == {"method": section.method, "size": RANKS}
