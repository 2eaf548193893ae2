"""Worlds that run scripts of TRL, with and without a section, when a test asks for results."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

if any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers", "accelerate", "trl")):
    collect_ignore_glob = ["test_*.py"]

sys.path.insert(0, str(HERE.parent / "deepspeed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.deepspeed)
            item.add_marker(pytest.mark.timeout(700))


class World:
    """What scripts came to on some ranks."""

    def __init__(self, ranks: int, section: dict[str, Any] | None, names: list[str], folder: Path) -> None:
        from deepspeed_world import run_ranks
        from trl_cases import MODEL, PREFERENCES
        from trl_models import save_model, save_preferences

        self.ranks, self.folder = ranks, folder
        self.failure: AssertionError | None = None
        save_model(folder / MODEL)
        save_preferences(folder / PREFERENCES)
        command = ["-m", "dsp_plugin.launch", str(HERE / "trl_worker.py"), str(folder), json.dumps(section), *names]
        try:
            run_ranks(command, ranks, folder, 600)
        except AssertionError as failure:
            self.failure = failure

    def results(self, name: str) -> list[dict[str, Any]]:
        """By rank."""
        paths = [self.folder / f"{name}.rank{rank}.json" for rank in range(self.ranks)]
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        failed = [result["failed"] for result in found if "failed" in result]
        assert not failed, failed[0]
        assert len(found) == self.ranks, f"{self.ranks - len(found)} ranks never ended {name}:\n{self.failure}"
        return found


@pytest.fixture(scope="session")
def trl_world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[int, dict[str, Any] | None], World]:
    """The world of so many ranks under a section; it runs once per session, all scripts with ``--matrix``."""
    from trl_cases import COVERING, HEAD, REFUSED, SCRIPTS

    worlds: dict[str, World] = {}
    names = list(SCRIPTS) if request.config.getoption("--matrix") else list(COVERING)

    def of(ranks: int, section: dict[str, Any] | None) -> World:
        key = f"{ranks} {section}"
        if key not in worlds:
            every = names if section is None else [*REFUSED, HEAD, *names]
            worlds[key] = World(ranks, section, every, tmp_path_factory.mktemp(f"trl{ranks}"))
        return worlds[key]

    return of
