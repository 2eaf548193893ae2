"""The commands of README and docs: what they start takes what they give it. Nothing is run here."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from rooms import ROOT

from dsp_plugin.cli.app import app
from dsp_plugin.launch.__main__ import Command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = ROOT / "launch" / "examples"
SHARED = [EXAMPLES / f"{name}.py" for name in ("core_training", "core_checkpoint", "deepspeed_training")]


def commands(page: Path) -> list[str]:
    """Of a page: indented, or behind a prompt; without comments, on one line each."""
    text = page.read_text().replace("\\\n", " ")
    lines = (line.removeprefix("$ ").strip() for line in text.splitlines() if re.match(r" {4}|\$ ", line))
    return [re.split(r"\s#\s", line)[0].strip() for line in lines]


DOCUMENTED = [command for page in PAGES for command in commands(page)]
OF_THE_PROGRAM = [command for command in DOCUMENTED if command.startswith("dsp-plugin ")]
LAUNCHED = [command for command in DOCUMENTED if " dsp_plugin.launch " in command]
TARGETS = [command for command in DOCUMENTED if command.startswith("make ")]


def flags_of(script: Path) -> set[str]:
    """What a script's parser takes, and those that the scripts share."""
    if "parse_args_" in (source := script.read_text()):
        return flags_of_dataclasses(source)
    return {
        str(argument.value)
        for path in (script, *SHARED)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument")
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }


def flags_of_dataclasses(source: str) -> set[str]:
    """What Hugging Face's parsers take: the fields of a script's classes, and of those of the libraries."""
    own = {
        field.target.id
        for kind in ast.walk(ast.parse(source))
        if isinstance(kind, ast.ClassDef)
        for field in kind.body
        if isinstance(field, ast.AnnAssign)
    }
    libraries = (("transformers", "TrainingArguments"), ("trl", "SFTConfig"), ("trl", "ModelConfig"))
    named = [getattr(importlib.import_module(library), name) for library, name in libraries if name in source]
    taken = own.union(*({field.name for field in dataclasses.fields(kind)} for kind in named))
    return {f"--{name.replace('_', character)}" for name in taken for character in "_-"}


def test_commands_are_found():
    assert len(OF_THE_PROGRAM) >= 6
    assert len(LAUNCHED) >= 10
    assert len(TARGETS) >= 2


@pytest.mark.parametrize("command", OF_THE_PROGRAM)
def test_the_program_takes_what_pages_give_it(command):
    name, *arguments = shlex.split(command)[1:]
    typer.main.get_command(app).commands[name].make_context(name, arguments)


@pytest.mark.parametrize("command", LAUNCHED)
def test_the_launcher_and_its_scripts_take_what_pages_give_them(command, tmp_path, monkeypatch):
    for name in ("train.py", "pretrain_gpt.py"):
        (tmp_path / name).touch()
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    launched = Command.parse(
        [word for word in words[words.index("dsp_plugin.launch") + 1 :] if word != "..."] or ["train.py"]
    )
    script = ROOT / launched.script
    if script.is_relative_to(EXAMPLES):
        given = {word.partition("=")[0] for word in launched.arguments if word.startswith("--")}
        assert given <= flags_of(script)
    if "--deepspeed_config" in launched.arguments and script.is_file():
        assert Path(launched.arguments[launched.arguments.index("--deepspeed_config") + 1]).is_file()


@pytest.mark.parametrize("command", TARGETS)
def test_make_has_the_targets_that_pages_name(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
