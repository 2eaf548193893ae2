"""What pages, docstrings and comments name is there: modules, what is in them, files, folders, places to link to."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from rooms import MAY_IMPORT, PACKAGES, ROOT, files, own_modules

FOLDERS = (*PACKAGES, "benchmarks", "configs", "docs", "tests")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "benchmarks" / "results" / "README.md"]
SETTINGS = sorted(
    path for folder in ("launch", "configs") for path in (ROOT / folder).rglob("*.*") if path.suffix != ".py"
)
SOURCES = [path for folder in (*PACKAGES, "benchmarks") for path in files(folder)]

# A group of entry points, which is no module.
NO_MODULES = {"dsp_plugin.autoload"}
# Files that readers have, that programs write, or that once were.
NOT_OURS = {"train.py", "ds.json", "forecast.png", "forecaster.py", "forecaster_plan.py"}
NOT_OURS |= {"sequence_parallel.json", "sequence_parallel_files.json", "rank-R.json", "megatron_gpt_ulysses.sh"}
NOT_OURS |= {"config.json", "gpt.args", "FILE.svg"}

DOTTED = re.compile(r"(?<![\w./-])dsp_plugin(?:\.[A-Za-z_]\w*)+")
WORD = r"[\w./*{},-]*"
BELOW = re.compile(rf"(?<![\w./$-])(?:{'|'.join(FOLDERS)})/{WORD}")
FILE = re.compile(rf"(?<![\w./<>$-]){WORD}\w\.(?:py|sh|sbatch|args|md|json|toml|cfg|svg|png)\b")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@cache
def text_of(path: Path) -> str:
    """A page as it is, of a module what is written for readers: docstrings and comments."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    found = [
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, documented))
    return "\n".join([*found, *(ast.get_docstring(node) or "" for node in nodes)])


@cache
def tree() -> frozenset[str]:
    """Every file and folder, below the root."""
    found = (path for folder in FOLDERS for path in (ROOT / folder, *(ROOT / folder).rglob("*")))
    top = ("README.md", "CHANGELOG.md", "Makefile", "setup.cfg", "pyproject.toml")
    return frozenset([*top, *(path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts)])


@cache
def ends() -> frozenset[str]:
    """What paths end with, in whole parts."""
    return frozenset("/".join(path.split("/")[start:]) for path in tree() for start in range(path.count("/") + 1))


@cache
def exists(word: str, anywhere: bool) -> bool:
    """Whether a path, also one with stars or braces, is there: from the root, or the end of one."""
    pattern = re.sub(r"\{[^}]*\}", "*", word.rstrip("/"))
    known = ends() if anywhere else tree()
    return pattern in known or ("*" in pattern and any(fnmatchcase(path, pattern) for path in known))


@cache
def body_of(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


def names_in(body: list[ast.stmt]) -> Iterator[tuple[str, list[ast.stmt]]]:
    """What a module or a class defines, each with what it defines in turn."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.body
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, []) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), []) for target in node.targets)
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), []
        elif isinstance(node, ast.If | ast.Try):
            yield from names_in(node.body)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    modules = {**own_modules(), "dsp_plugin.configs": ROOT / "configs" / "__init__.py"}
    module = name
    while module not in modules:
        module = module.rpartition(".")[0]
    body = body_of(modules[module])
    for part in name.removeprefix(module).split(".")[1:]:
        defined = dict(names_in(body))
        if part not in defined:
            return False
        body = defined[part]
    return True


def anchors(page: Path) -> set[str]:
    """The places in a page that can be linked to, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def where(path: Path, word: str) -> str:
    return f"{path.relative_to(ROOT)}: {word}"


def test_names_are_told_from_those_that_are_not_there():
    there = (
        "dsp_plugin.kernels.merge",
        "dsp_plugin.layout.placement.Layout.length",
        "dsp_plugin.Plan",
        "dsp_plugin.configs",
    )
    assert [name for name in there if not resolves(name)] == []
    assert not resolves("dsp_plugin.region")
    assert not resolves("dsp_plugin.layout.placement.Layout.colour")


@pytest.mark.parametrize(
    ("word", "anywhere", "there"),
    [
        ("configs/*/video_dsp_zero{1,2}.json", False, True),
        ("comm/wire.py", True, True),
        ("comm/wire.py", False, False),
        ("launch/elastic.sh", True, False),
        ("region_plan.py", True, False),
    ],
)
def test_paths_are_told_from_those_that_are_not_there(word, anywhere, there):
    assert exists(word, anywhere) == there


def test_dotted_names_lead_somewhere():
    lost = [
        where(path, name)
        for path in (*PAGES, *SETTINGS, *SOURCES)
        for name in DOTTED.findall(text_of(path))
        if name not in NO_MODULES and not resolves(name)
    ]
    assert not lost, "\n".join(lost)


def test_paths_and_files_are_there():
    lost = []
    for path in (*PAGES, *SETTINGS, *SOURCES):
        text = text_of(path)
        below = [word.rstrip(".,-") if "{" in word else word.rstrip(".,-}") for word in BELOW.findall(text)]
        lost += [where(path, word) for word in below if not exists(word, False) and word not in MAY_IMPORT]
        named = [word for word in FILE.findall(text) if Path(word).name not in NOT_OURS]
        lost += [where(path, word) for word in named if not exists(word, True)]
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        to = (page.parent / target).resolve() if target else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), f"{target}#{anchor}"
