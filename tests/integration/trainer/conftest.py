"""Worlds that run scripts of the Trainer, with and without a section, when a test asks for results."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

if any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers", "accelerate")):
    collect_ignore_glob = ["test_*.py"]

sys.path.insert(0, str(HERE.parent / "deepspeed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.deepspeed)
            item.add_marker(pytest.mark.timeout(500))


class World:
    """What scripts came to on some ranks."""

    def __init__(
        self, ranks: int, section: dict[str, Any] | None, names: list[str], folder: Path, told: bool = False
    ) -> None:
        from deepspeed_world import run_ranks

        self.ranks, self.folder = ranks, folder
        self.failure: AssertionError | None = None
        option = ["--sequence-parallel", json.dumps(section)] if told and section is not None else []
        script = [str(HERE / "trainer_worker.py"), str(folder), json.dumps(None if told else section), *names]
        command = ["-m", "dsp_plugin.launch", *option, *script]
        try:
            run_ranks(command, ranks, folder, 400)
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
def trainer_world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[int, dict[str, Any] | None], World]:
    """The world of so many ranks under a section; it runs once per session, all scripts with ``--matrix``."""
    from accelerate_cases import COVERING_LOOPS, LOOPS
    from trainer_cases import COVERING, SCRIPTS

    everything = request.config.getoption("--matrix")
    names = [*SCRIPTS, *LOOPS] if everything else [*COVERING, *COVERING_LOOPS]
    return _worlds(names, tmp_path_factory, told=False)


@pytest.fixture(scope="session")
def told_world(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[int, dict[str, Any] | None], World]:
    """As `trainer_world`, without DeepSpeed: the launcher is told the section."""
    from accelerate_cases import COVERING_WRAPPED_LOOPS, WRAPPED_LOOPS
    from trainer_cases import COVERING_DDP, DDP_SCRIPTS

    everything = request.config.getoption("--matrix")
    names = [*DDP_SCRIPTS, *WRAPPED_LOOPS] if everything else [*COVERING_DDP, *COVERING_WRAPPED_LOOPS]
    return _worlds(names, tmp_path_factory, told=True)


def _worlds(
    names: list[str], folders: pytest.TempPathFactory, told: bool
) -> Callable[[int, dict[str, Any] | None], World]:
    worlds: dict[str, World] = {}

    def of(ranks: int, section: dict[str, Any] | None) -> World:
        key = f"{ranks} {section}"
        if key not in worlds:
            worlds[key] = World(ranks, section, names, folders.mktemp(f"trainer{ranks}"), told)
        return worlds[key]

    return of
