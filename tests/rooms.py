"""The rooms of the source and who may import whom, as data, and what the source really imports."""

from __future__ import annotations

import ast
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[1]
Node = TypeVar("Node", bound=Hashable)
PACKAGES = {"dsp_plugin": "dsp_plugin", "patches": "dsp_plugin.patches", "launch": "dsp_plugin.launch"}

# What lies in the library's root: a room each, for they may import each other downwards only.
NOUNS = ("errors", "adjacent", "integers", "derivatives", "mask", "groups", "spawn")
# The folders that are rooms of their own, the innermost first.
FOLDERS = (
    "patches/megatron/models",
    *(f"patches/{framework}" for framework in ("megatron", "deepspeed", "transformers", "accelerate", "diffusers")),
    "launch/examples",
    *(
        f"dsp_plugin/{room}"
        for room in (
            *(
                "layout",
                "comm",
                "kernels",
                "tiles",
                "methods",
                "config",
                "plans",
                "planner",
                "sharding",
                "training",
                "watch",
            ),
            *("models", "rehearsal", "verification", "cli"),
        )
    ),
    "patches",
    "launch",
)
# The names that users give to models on Megatron, whose files lie in the folder below.
DOORS = tuple(f"patches/megatron/{name}" for name in ("linear_specs", "video_dit", "vit"))
# Modules that are rooms of their own: each knows what is built on the rest of its folder, which knows nothing of it.
ALONE = ("patches/autoload", *DOORS)
_LIBRARY = (
    *NOUNS,
    "layout",
    "comm",
    "kernels",
    "tiles",
    "methods",
    "config",
    "plans",
    "planner",
    "sharding",
    "training",
    "watch",
)
_SEAM = ("errors", "layout", "groups", "comm", "methods", "config")

# What may see the whole library below it.
TOOLS = ("rehearsal", "verification", "cli")
# Room: the rooms that it may import from. Anything else is an arrow against the drawing.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "adjacent": (),
    "integers": ("errors",),
    "derivatives": ("errors",),
    "layout": ("errors", "integers"),
    "mask": ("errors", "integers"),
    "spawn": ("comm",),
    "groups": ("comm",),
    "comm": ("errors", "adjacent", "integers", "derivatives", "layout"),
    "kernels": ("errors", "adjacent", "integers", "derivatives", "mask"),
    "tiles": ("errors", "derivatives"),
    "training": ("errors", "integers", "derivatives", "comm", "groups"),
    "watch": ("errors", "comm"),
    "methods": ("errors", "integers", "derivatives", "layout", "mask", "groups", "comm", "kernels", "training"),
    "config": ("errors", "integers", "layout", "kernels", "methods"),
    "plans": ("errors", "config"),
    "planner": ("errors", "integers", "layout", "mask", "plans", "methods", "config", "tiles"),
    "sharding": (
        *("errors", "derivatives", "layout", "mask", "groups", "comm", "kernels", "methods", "config", "plans"),
        *("planner", "training", "patches"),
    ),
    "models": ("errors", "kernels", "tiles", "plans"),
    "rehearsal": (*_LIBRARY, "models"),
    "verification": _LIBRARY,
    "cli": (*_LIBRARY, "models", "rehearsal", "verification"),
    "dsp_plugin": tuple(
        room for room in _LIBRARY if room not in ("adjacent", "integers", "derivatives", "spawn", "planner", "watch")
    ),
    "patches": ("errors", "integers", "comm", "training", "watch"),
    "patches/autoload": ("config", "patches", "patches/deepspeed", "patches/accelerate", "patches/transformers"),
    "patches/diffusers": ("errors", "plans"),
    "patches/transformers": (*_SEAM, "mask", "kernels", "tiles", "plans", "planner", "sharding", "training", "patches"),
    "patches/deepspeed": (*_SEAM, "plans", "sharding", "training", "patches", "patches/transformers"),
    "patches/accelerate": (
        *("errors", "groups", "comm", "config", "sharding", "training", "patches", "patches/transformers"),
    ),
    "patches/megatron": (*_SEAM, "integers", "mask", "kernels", "tiles", "planner", "training", "patches"),
    "patches/megatron/models": (*_SEAM, "integers", "kernels", "planner", "models", "patches/megatron"),
    **dict.fromkeys(DOORS, ("patches/megatron/models",)),
    "launch": ("errors", "comm", "config", "watch", "patches", "patches/megatron"),
    "launch/examples": ("dsp_plugin", "kernels", "models", "patches/megatron/models", *DOORS),
}
# Of a room that others may know in part only, the files that they may know.
ONLY = {
    ("groups", "comm"): ("axis",),
    ("methods", "training"): ("recompute",),
    ("sharding", "patches"): ("recompute", "post_import"),
    ("watch", "comm"): ("ledger", "agreement"),
    ("spawn", "comm"): ("agreement",),
    ("launch", "config"): ("told",),
    ("patches/autoload", "config"): ("told",),
    ("config", "kernels"): ("spec", "candidates"),
}


@dataclass(frozen=True)
class Import:
    """``file`` imports ``module``, a dotted name; ``in_function``, or ``for_types``, for type checkers alone."""

    file: Path
    line: int
    module: str
    in_function: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def files(folder: str) -> list[Path]:
    """The modules below a folder of the repository."""
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    """The dotted name by which a file is imported."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import in a file, those in functions, under conditions and by ``import_module`` too."""
    return tuple(_imports_of(path))


def _imports_of(path: Path) -> Iterator[Import]:
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
            yield Import(path, getattr(node, "lineno", 0), name, id(node) in inside, id(node) in for_types)


def all_imports(*folders: str) -> list[Import]:
    """Those of every module below the folders."""
    return [found for folder in folders for path in files(folder) for found in imports_of(path)]


def room_of(path: Path) -> str:
    """The room that a module lies in."""
    relative = path.relative_to(ROOT)
    alone = relative.with_suffix("").as_posix()
    if alone in ALONE:
        return alone
    for folder in FOLDERS:
        if relative.is_relative_to(folder):
            return folder.removeprefix("dsp_plugin/")
    return "dsp_plugin" if path.stem == "__init__" else path.stem


def own_modules() -> dict[str, Path]:
    """Every module of the project, by its dotted name."""
    return {module_of(path): path for folder in PACKAGES for path in files(folder)}


def target_of(found: Import, modules: Mapping[str, Path]) -> Path | None:
    """The module of the project that is imported, or from which a name is; None for anybody else's."""
    name = found.module
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return modules.get(name)


def arrows() -> dict[Path, set[Path]]:
    """Who imports whom, file by file."""
    modules = own_modules()
    drawn: dict[Path, set[Path]] = {}
    for path in modules.values():
        targets = (target_of(found, modules) for found in imports_of(path))
        drawn[path] = {target for target in targets if target is not None and target != path}
    return drawn


def room_arrows() -> dict[str, set[str]]:
    """Who imports whom, room by room."""
    drawn: dict[str, set[str]] = {}
    for path, targets in arrows().items():
        room = room_of(path)
        drawn.setdefault(room, set()).update(other for other in map(room_of, targets) if other != room)
    return drawn


def circle(graph: Mapping[Node, Iterable[Node]]) -> list[Node]:
    """The nodes of a circle, the first one repeated at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
