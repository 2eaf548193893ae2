"""Worlds that run scripts of the Trainer, with and without a section, when a test asks for results."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "deepspeed"))

from script_world import ScriptWorld

HERE = Path(__file__).parent

if any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers", "accelerate")):
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.deepspeed)
            item.add_marker(pytest.mark.timeout(500))


@pytest.fixture(scope="session")
def trainer_world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[int, dict[str, Any] | None], ScriptWorld]:
    """The world of so many ranks under a section; it runs once per session, all scripts with ``--matrix``."""
    from accelerate_cases import COVERING_LOOPS, LOOPS
    from trainer_cases import COVERING, SCRIPTS

    everything = request.config.getoption("--matrix")
    names = [*SCRIPTS, *LOOPS] if everything else [*COVERING, *COVERING_LOOPS]
    return _worlds(names, tmp_path_factory, told=False)


@pytest.fixture(scope="session")
def told_world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[int, dict[str, Any] | None], ScriptWorld]:
    """As `trainer_world`, without DeepSpeed: the launcher is told the section."""
    from accelerate_cases import COVERING_WRAPPED_LOOPS, WRAPPED_LOOPS
    from trainer_cases import COVERING_DDP, DDP_SCRIPTS

    everything = request.config.getoption("--matrix")
    names = [*DDP_SCRIPTS, *WRAPPED_LOOPS] if everything else [*COVERING_DDP, *COVERING_WRAPPED_LOOPS]
    return _worlds(names, tmp_path_factory, told=True)


def _worlds(
    names: list[str], folders: pytest.TempPathFactory, told: bool
) -> Callable[[int, dict[str, Any] | None], ScriptWorld]:
    from trainer_cases import READ_IN_TRAINING

    worlds: dict[str, ScriptWorld] = {}

    def of(ranks: int, section: dict[str, Any] | None) -> ScriptWorld:
        key = f"{ranks} {section}"
        if key not in worlds:
            folder = folders.mktemp(f"trainer{ranks}")
            option = ["--sequence-parallel", json.dumps(section)] if told and section is not None else []
            tiled = section is not None and "memory" in section
            chosen = [name for name in names if not tiled or name not in READ_IN_TRAINING]
            script = [str(HERE / "trainer_worker.py"), str(folder), json.dumps(None if told else section), *chosen]
            worlds[key] = ScriptWorld(["-m", "dsp_plugin.launch", *option, *script], ranks, folder, 400)
        return worlds[key]

    return of
