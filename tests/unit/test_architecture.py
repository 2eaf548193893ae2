"""The arrows of the architecture: who may import whom, and how files are cut. Read from the source, not by import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"dsp_plugin": "dsp_plugin", "patches": "dsp_plugin.patches", "launch": "dsp_plugin.launch"}
UPSTREAM = {"megatron", "deepspeed", "transformers", "diffusers"}
STANDARD_LIBRARY = set(sys.stdlib_module_names)
LONGEST = 420


@dataclass(frozen=True)
class Import:
    """``file`` imports ``module``, a dotted name, at its top level or inside a function, when it runs."""

    file: Path
    line: int
    module: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, functions) for node in ast.walk(function)}
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        for name in names:
            yield Import(path, getattr(node, "lineno", 0), name, id(node) in inside)


def all_imports(*folders: str) -> list[Import]:
    return [found for folder in folders for path in files(folder) for found in imports_of(path)]


def reaches(found: Import, *modules: str) -> bool:
    return any(found.module == module or found.module.startswith(f"{module}.") for module in modules)


def listed(offenders: list[Import]) -> str:
    return "\n".join(map(str, offenders))


def test_the_reader_sees_every_kind_of_import(tmp_path, monkeypatch):
    source = tmp_path / "dsp_plugin" / "comm" / "x.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import torch.nn as nn\nfrom dsp_plugin.groups import Axis\nfrom ..layout import Layout\nfrom . import wire\n"
        "if TYPE_CHECKING:\n    import diffusers\n"
        "def f():\n    import megatron.core\n    import_module('deepspeed.ops')\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = [(item.module, item.in_function) for item in imports_of(source)]
    assert sorted(found) == [
        ("deepspeed.ops", True),
        ("dsp_plugin.comm.wire", False),
        ("dsp_plugin.groups.Axis", False),
        ("dsp_plugin.layout.Layout", False),
        ("megatron.core", True),
        ("torch.nn", False),
    ]


def test_launch_imports_patches_imports_the_library():
    library = [
        found for found in all_imports("dsp_plugin") if reaches(found, "dsp_plugin.patches", "dsp_plugin.launch")
    ]
    assert not library, listed(library)
    patches = [found for found in all_imports("patches") if reaches(found, "dsp_plugin.launch")]
    assert not patches, listed(patches)


# Folder or file of the library: what it must not import from the library.
FORBIDDEN = {
    "errors.py": ["dsp_plugin"],
    "layout.py": [f"dsp_plugin.{name}" for name in ("config", "groups", "comm", "kernels", "methods", "planner")],
    "mask.py": [f"dsp_plugin.{name}" for name in ("config", "groups", "comm", "kernels", "methods", "planner")],
    "groups.py": [f"dsp_plugin.{name}" for name in ("comm", "kernels", "methods", "planner", "parallelize")],
    "comm": [f"dsp_plugin.{name}" for name in ("methods", "kernels", "planner", "config", "parallelize", "models")],
    "kernels": [f"dsp_plugin.{name}" for name in ("methods", "comm", "planner", "config", "groups", "models")],
    "methods": [f"dsp_plugin.{name}" for name in ("planner", "config", "parallelize", "models", "routing", "plan")],
    "planner": [f"dsp_plugin.{name}" for name in ("parallelize", "region", "routing", "batch", "models", "rehearsal")],
    "models": [f"dsp_plugin.{name}" for name in ("comm", "groups", "methods", "parallelize", "config")],
}


@pytest.mark.parametrize("part", FORBIDDEN)
def test_arrows_inside_the_library(part):
    path = ROOT / "dsp_plugin" / part
    sources = [path] if path.is_file() else files(f"dsp_plugin/{part}")
    assert sources
    offenders = []
    for source in sources:
        own = module_of(source)
        for found in imports_of(source):
            if reaches(found, *FORBIDDEN[part]) and not found.module.startswith(f"{own}."):
                offenders.append(found)
    assert not offenders, listed(offenders)


def test_nothing_imports_the_command_line():
    offenders = [found for found in all_imports(*PACKAGES) if reaches(found, "dsp_plugin.cli")]
    assert not offenders, listed(offenders)


def test_upstream_packages_are_imported_only_by_patches_and_scripts_and_only_when_needed():
    library = [found for found in all_imports("dsp_plugin") if reaches(found, *UPSTREAM)]
    assert not library, listed(library)
    eager = [found for found in all_imports("patches") if reaches(found, *UPSTREAM) and not found.in_function]
    assert not eager, listed(eager)


def test_the_library_needs_no_more_than_it_declares():
    # What only the command line, the demo and the verification need is imported by them alone.
    allowed = {"torch", "pydantic", "einops", "numpy", "dsp_plugin", "__future__", "packaging"}
    tools = {"cli.py", "cli_dryrun.py", "cli_output.py", "cli_plans.py", "doctor.py", "demo.py"}
    optional = {"flash_attn", "flash_attn_interface", "flash_attn_2_cuda"}
    offenders = []
    for path in files("dsp_plugin"):
        if path.name in tools or "verification" in path.parts:
            continue
        for found in imports_of(path):
            top = found.module.split(".")[0]
            known = top in allowed or top in STANDARD_LIBRARY or (top in optional and "kernels" in path.parts)
            known = known or (top == "wandb" and path.name == "log_writers.py")
            if not known:
                offenders.append(found)
    assert not offenders, listed(offenders)


@pytest.mark.parametrize("folder", PACKAGES)
def test_files_are_short_and_named_after_what_they_do(folder):
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    for path in files(folder):
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST, f"{path.relative_to(ROOT)} has {lines} lines: one concern each, {LONGEST} at most"
        assert path.stem not in vague, path


def test_no_missing_work_is_marked_in_the_source():
    words = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "pass  #"]))
    offenders = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in (*PACKAGES, "configs", "tests")
        for path in files(folder)
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert not offenders, "\n".join(offenders)
