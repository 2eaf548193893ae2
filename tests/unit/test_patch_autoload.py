"""Post-import hooks: called once the module is there, transparent to everything else."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsp_plugin.patches.post_import import PostImportFinder, after_import

NAME = "hooked_module"


@pytest.fixture
def module_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield path
    sys.modules.pop(NAME, None)


def test_hook_runs_after_the_module_is_executed(module_file: Path) -> None:
    seen: list[int] = []
    after_import(NAME, lambda: seen.append(sys.modules[NAME].value))  # type: ignore[attr-defined]
    assert seen == []
    module = importlib.import_module(NAME)
    assert seen == [1]
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader", "our loader must stand aside"


def test_hook_runs_at_once_for_an_imported_module(module_file: Path) -> None:
    importlib.import_module(NAME)
    seen: list[str] = []
    after_import(NAME, lambda: seen.append("now"))
    assert seen == ["now"]


def test_looking_a_module_up_does_not_use_the_hook_up(module_file: Path) -> None:
    seen: list[str] = []
    after_import(NAME, lambda: seen.append("imported"))
    assert importlib.util.find_spec(NAME) is not None
    assert seen == []
    importlib.import_module(NAME)
    assert seen == ["imported"]


def test_one_hook_per_module(module_file: Path) -> None:
    seen: list[str] = []
    for _ in range(2):
        after_import(NAME, lambda: seen.append("imported"))
    importlib.import_module(NAME)
    assert seen == ["imported"]
    assert sum(isinstance(finder, PostImportFinder) and finder.module == NAME for finder in sys.meta_path) == 1


def test_absent_module_stays_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    after_import("no_such_module_at_all", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        importlib.import_module("no_such_module_at_all")


def test_importing_the_plugin_imports_no_framework() -> None:
    code = (
        "import sys, dsp_plugin\n"
        "from dsp_plugin.patches.post_import import PostImportFinder\n"
        "names = ('deepspeed', 'megatron.core', 'transformers', 'diffusers')\n"
        "frameworks = [name for name in names if name in sys.modules]\n"
        "hooked = [finder.module for finder in sys.meta_path if isinstance(finder, PostImportFinder)]\n"
        "print(frameworks, hooked)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == (
        "[] ['transformers.trainer', 'transformers.training_args', 'transformers.modeling_utils', 'accelerate', "
        "'deepspeed', 'torch._dynamo']"
    )
