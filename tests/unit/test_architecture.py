"""The arrows of the architecture: who may import whom, and how files are cut. Read from the source, not by import."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import rooms
from rooms import (
    MAY_IMPORT,
    NOUNS,
    ONLY,
    PACKAGES,
    ROOT,
    TOOLS,
    Import,
    all_imports,
    arrows,
    circle,
    files,
    imports_of,
    own_modules,
    room_arrows,
    room_of,
    target_of,
)

UPSTREAM = {"megatron", "deepspeed", "transformers", "diffusers"}
STANDARD_LIBRARY = set(sys.stdlib_module_names)
LONGEST = 400
MOST_IN_ROOT = 8


def reaches(found: Import, *modules: str) -> bool:
    return any(found.module == module or found.module.startswith(f"{module}.") for module in modules)


def listed(offenders: list[Import]) -> str:
    return "\n".join(map(str, offenders))


def test_the_reader_sees_every_kind_of_import(tmp_path, monkeypatch):
    source = tmp_path / "dsp_plugin" / "comm" / "x.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import torch.nn as nn\nfrom dsp_plugin.groups import Axis\nfrom ..layout import Layout\nfrom . import wire\n"
        "if TYPE_CHECKING:\n    from dsp_plugin import mask\n"
        "def f():\n    import megatron.core\n    import_module('deepspeed.ops')\n"
    )
    monkeypatch.setattr(rooms, "ROOT", tmp_path)
    found = [(item.module, item.in_function) for item in imports_of(source)]
    assert sorted(found) == [
        ("deepspeed.ops", True),
        ("dsp_plugin.comm.wire", False),
        ("dsp_plugin.groups.Axis", False),
        ("dsp_plugin.layout.Layout", False),
        ("dsp_plugin.mask", False),
        ("megatron.core", True),
        ("torch.nn", False),
    ]


def test_every_room_is_in_the_table():
    found = {room_of(path) for path in own_modules().values()}
    assert found == set(MAY_IMPORT)


def test_imports_go_along_the_table():
    modules, offenders = own_modules(), []
    for path in modules.values():
        here = room_of(path)
        for found in imports_of(path):
            target = target_of(found, modules)
            there = here if target is None else room_of(target)
            if target is not None and there != here:
                known = ONLY.get((here, there), (target.stem,))
                if there not in MAY_IMPORT[here] or target.stem not in known:
                    offenders.append(found)
    assert not offenders, listed(offenders)


def test_the_table_has_no_arrow_that_nobody_uses():
    """So that it says what is, not what once was or might be."""
    drawn = room_arrows()
    allowed = [(room, other) for room in MAY_IMPORT if room not in TOOLS for other in MAY_IMPORT[room]]
    assert not [arrow for arrow in allowed if arrow[1] not in drawn[arrow[0]]]


def test_a_circle_is_found():
    assert circle({1: [2, 3], 2: [3], 3: []}) == []
    assert set(circle({1: [2], 2: [3, 4], 3: [], 4: [2]})) == {2, 4}


def test_no_files_import_each_other_in_a_circle():
    found = circle(arrows())
    assert not found, " -> ".join(str(path.relative_to(ROOT)) for path in found)


def test_no_rooms_import_each_other_in_a_circle():
    assert not circle(room_arrows()), " -> ".join(circle(room_arrows()))


def test_the_root_holds_what_everyone_shares():
    modules = sorted(path.stem for path in (ROOT / "dsp_plugin").glob("*.py"))
    assert modules == sorted([*NOUNS, "__init__"])
    assert len(modules) <= MOST_IN_ROOT


def test_nothing_imports_the_command_line():
    cli = [path for path, targets in arrows().items() if "cli" in map(room_of, targets) and room_of(path) != "cli"]
    assert not cli


def test_upstream_packages_are_imported_only_by_patches_and_scripts_and_only_when_needed():
    library = [found for found in all_imports("dsp_plugin") if reaches(found, *UPSTREAM)]
    assert not library, listed(library)
    upstream = [found for found in all_imports("patches") if reaches(found, *UPSTREAM)]
    eager = [found for found in upstream if not (found.in_function or found.for_types)]
    assert not eager, listed(eager)


def test_the_library_needs_no_more_than_it_declares():
    # What only the command line, the demo and the verification need is imported by them alone.
    allowed = {"torch", "pydantic", "einops", "numpy", "dsp_plugin", "__future__", "packaging"}
    optional = {"flash_attn", "flash_attn_interface", "flash_attn_2_cuda", "triton"}
    offenders = []
    for path in files("dsp_plugin"):
        if room_of(path) in ("cli", "verification"):
            continue
        for found in imports_of(path):
            top = found.module.split(".")[0]
            known = top in allowed or top in STANDARD_LIBRARY or (top in optional and "kernels" in path.parts)
            known = known or (top == "wandb" and path.name == "log_writers.py")
            if not known:
                offenders.append(found)
    assert not offenders, listed(offenders)


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "benchmarks"])
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
