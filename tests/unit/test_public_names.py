"""The names that users and docs give. What is listed here stays where it is; anything else may move."""

from __future__ import annotations

import argparse
import ast
import re
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest
from rooms import ROOT, own_modules
from typer.testing import CliRunner

import dsp_plugin
from dsp_plugin.cli.app import app
from dsp_plugin.config.schema import DEEPSPEED_SECTION
from dsp_plugin.launch.__main__ import main
from dsp_plugin.patches.megatron.arguments import add_flags

# README: "Public".
LIBRARY = (
    *("linear_attention", "softmax_attention", "short_convolution", "parallelize", "Parallelized", "ledger", "METHODS"),
    *("token_log_probs", "AttentionSpec", "Where"),
    *("SequenceParallelBatchSampler", "SequenceParallelStream", "PackedDocuments"),
    *("SequenceParallelConfig", "SequenceParallelGroups", "Axis", "Layout", "MaskSpec", "Plan", "Region", "Stage"),
)
ERRORS = {
    "SequenceParallelConfigError": ValueError,
    "UnsupportedError": RuntimeError,
    "PatchError": RuntimeError,
    "CollectiveMismatchError": RuntimeError,
    "DamagedCheckpointError": ValueError,
}
METHODS = ("dsp", "ulysses", "ring", "usp", "lightseq", "lasp")

# Modules below the package that users import from or name, and what they take from there.
MODULES = {
    "dsp_plugin.models.linear_lm": ("LinearLM",),
    "dsp_plugin.models.video_dit": ("VideoDiT",),
    "dsp_plugin.models.vit": ("VisionTransformer",),
    "dsp_plugin.patches.megatron": ("install", "install_checkpoints", "installed", "uninstall"),
    "dsp_plugin.patches.megatron.linear_specs": ("gated_delta_gpt", "hybrid_layer_specs", "linear_layer_spec"),
    "dsp_plugin.patches.megatron.video_dit": ("ParallelVideoDiT", "VideoShape"),
    "dsp_plugin.patches.megatron.vit": ("ParallelVisionTransformer", "VitShape"),
    "dsp_plugin.rehearsal.dryrun": ("dry_run",),
    "dsp_plugin.rehearsal.validate": ("validate_plan",),
}
RUN_AS_MODULE = "dsp_plugin.launch"

COMMANDS = ("doctor", "verify", "verify-model", "plan", "plan-stages", "dry-run", "demo")
MEGATRON_FLAGS = (
    *("--sp-method", "--sp-ulysses-size", "--sp-ring-size", "--sp-ulysses-order", "--sp-ring-gradient-dtype"),
    *(
        "--sp-exchange",
        "--sp-softmax-method",
        "--sp-layout",
        "--sp-kernel",
        "--sp-debug",
        "--sp-recompute",
        "--sp-quiet",
    ),
    *("--sp-log-every", "--sp-log-tensorboard", "--sp-log-wandb", "--sp-peak-tflops"),
    "--sp-memory",
)
ENTRY_POINTS = {
    ("console_scripts", "dsp-plugin"): "dsp_plugin.cli.app:app",
    ("dsp_plugin.autoload", "frameworks"): "dsp_plugin.patches.autoload:install",
}

# What users read and copy from.
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").rglob("*.args")),
    *sorted((ROOT / "launch" / "jobs").iterdir()),
]


def test_the_library_has_the_names_of_the_readme():
    assert sorted(dsp_plugin.__all__) == sorted([*LIBRARY, *ERRORS])
    (listed,) = re.findall(r"^Public: (.*?)\n\n", (ROOT / "README.md").read_text(), re.M | re.S)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(dsp_plugin.__all__)
    for name in dsp_plugin.__all__:
        assert getattr(dsp_plugin, name) is not None


def test_errors_are_what_users_catch():
    for name, caught in ERRORS.items():
        assert issubclass(getattr(dsp_plugin, name), caught)


def test_methods():
    assert sorted(dsp_plugin.METHODS) == sorted(METHODS)


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_what_users_take_from_them(module):
    found = import_module(module)
    assert [name for name in MODULES[module] if not callable(getattr(found, name, None))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_nothing_else(page):
    known = {f"dsp_plugin.{name}" for name in dsp_plugin.__all__} | {RUN_AS_MODULE}
    known |= {f"{module}.{name}" for module, names in MODULES.items() for name in ("", *names)}
    named = re.findall(r"\bdsp_plugin(?:\.[A-Za-z_]\w*)+", page.read_text())
    assert [name for name in named if name not in known and f"{name}." not in known] == []
    taken = re.findall(r"^ *from (dsp_plugin[\w.]*) import (.+)$", page.read_text(), re.M)
    for module, names in taken:
        public = dsp_plugin.__all__ if module == "dsp_plugin" else MODULES[module]
        assert {name.strip() for name in names.strip("()").split(",")} <= set(public)


def test_commands():
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    found = re.findall(r"^  ([a-z-]+)  ", shown.output.partition("Commands:")[2], re.M)
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_itself(command):
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"{command} [OPTIONS]" in shown.output


def test_the_launcher_runs_as_a_module_and_takes_the_flags(capsys):
    assert find_spec(f"{RUN_AS_MODULE}.__main__") is not None
    main(["--help"])
    shown = capsys.readouterr().out
    assert [flag for flag in MEGATRON_FLAGS if not re.search(rf"^  {flag}\b", shown, re.M)] == []
    parser = add_flags(argparse.ArgumentParser(add_help=False))
    assert sorted(option for action in parser._actions for option in action.option_strings) == sorted(MEGATRON_FLAGS)


def test_the_section_of_deepspeeds_config():
    assert DEEPSPEED_SECTION == "sequence_parallel"
    config = dsp_plugin.SequenceParallelConfig.from_deepspeed({"sequence_parallel": {"method": "ring", "size": 2}})
    assert (config.method, config.size) == ("ring", 2)


@pytest.mark.parametrize(("group", "name"), ENTRY_POINTS)
def test_entry_points(group, name):
    # Not a list: an installation may be found twice, in its environment and in the checkout.
    assert {point.value for point in entry_points(group=group, name=name)} == {ENTRY_POINTS[group, name]}
    for point in entry_points(group=group, name=name):
        assert callable(point.load())


def test_no_other_module_only_passes_names_on():
    """So that what moves leaves nothing behind that is neither public nor of use."""
    passing = set()
    for module, path in own_modules().items():
        body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
        listing = (ast.Import, ast.ImportFrom)
        if path.stem != "__init__" and all(
            isinstance(node, listing) or ast.unparse(node).startswith("__all__ =") for node in body
        ):
            passing.add(module)
    assert passing <= MODULES.keys()
