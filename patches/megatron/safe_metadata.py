"""The pickled ``.metadata`` of `torch.distributed.checkpoint`, read without running what is in it.

Upstream hands the file to `pickle.load`, which calls whatever function the file names. The real content is dataclasses
of that package, shapes, dtypes and plain values.
"""

from __future__ import annotations

import dataclasses
import enum
import pickle
import types
from pathlib import Path
from typing import Any

import torch

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches import safe_load
from dsp_plugin.patches.patch import Patch

_PACKAGES = ("torch.distributed.checkpoint.", "torch.distributed._shard.")
_NAMED = {
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("builtins", "set"),
    # Empty classes that Megatron keeps for files of its older versions.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}


def patch() -> Patch:
    """`FileSystemReader.read_metadata` unpickles with `load`."""
    return Patch(
        "checkpoint metadata: load no code",
        "torch.distributed.checkpoint.filesystem:pickle",
        "torch",
        ">=2.4",
        lambda upstream: types.SimpleNamespace(**{**vars(upstream), "load": load}),
    )


def load(file: Any) -> Any:
    """As `pickle.load` of a stream, for nothing but what a checkpoint's metadata consists of.

    Raises:
        UnsupportedError: the file names another class or a function, and the user does not vouch for it; nothing of
            it has run.
    """
    return pickle.load(file) if safe_load.trusted() else _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._name = str(getattr(file, "name", ".metadata"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMED:
            return super().find_class(module, name)
        # A pickle can set attributes of what it names, so it gets functions of its own in place of what others use too.
        if module in ("pathlib", "pathlib._local") and name in ("Path", "PosixPath"):
            return lambda *parts: Path(*parts)
        if (module, name) == ("torch.serialization", "_get_layout"):
            layout_named = super().find_class(module, name)
            return lambda layout: layout_named(layout)
        # Resolving a dotted name reads attributes of attributes, which reaches any module that the first one imports.
        if "." not in name and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if "." not in name and module.startswith(_PACKAGES):
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise UnsupportedError(
            setting="checkpoint",
            value=self._name,
            why=f"its pickle names {module}.{name}, which no checkpoint's metadata consists of, and to load that could "
            "run code",
            remedy=f"if you trust whoever wrote the file, set {safe_load.TRUST}=1",
        )
