"""Worlds that run scripts of TRL, with and without a section, when a test asks for results."""

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

if any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers", "accelerate", "trl")):
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.deepspeed)
            item.add_marker(pytest.mark.timeout(700))


@pytest.fixture(scope="session")
def trl_world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[int, dict[str, Any] | None], ScriptWorld]:
    """The world of so many ranks under a section; it runs once per session, all scripts with ``--matrix``."""
    from trl_cases import COVERING, HEAD, MODEL, PREFERENCES, REFUSED, SCRIPTS
    from trl_models import save_model, save_preferences

    worlds: dict[str, ScriptWorld] = {}
    names = list(SCRIPTS) if request.config.getoption("--matrix") else list(COVERING)

    def of(ranks: int, section: dict[str, Any] | None) -> ScriptWorld:
        key = f"{ranks} {section}"
        if key not in worlds:
            every = names if section is None else [*REFUSED, HEAD, *names]
            folder = tmp_path_factory.mktemp(f"trl{ranks}")
            save_model(folder / MODEL)
            save_preferences(folder / PREFERENCES)
            script = [str(HERE / "trl_worker.py"), str(folder), json.dumps(section), *every]
            worlds[key] = ScriptWorld(["-m", "dsp_plugin.launch", *script], ranks, folder, 600)
        return worlds[key]

    return of
