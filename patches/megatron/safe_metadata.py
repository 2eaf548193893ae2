"""The pickled ``.metadata`` of `torch.distributed.checkpoint`, read without running what is in it.

Upstream hands the file to `pickle.load`, which calls whatever function the file names, and sets whatever attribute of
whatever it names: a method of a class that the process goes on to use, too. The real content is dataclasses of that
package, shapes, dtypes and plain values.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches import safe_load
from dsp_plugin.patches.patch import Patch

_RECORDS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata"),
        )
    ),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    # Plans, which planners that save often keep beside the metadata.
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")
    ),
    # Where torch before 2.3 had it.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    # Empty classes that Megatron keeps for files of its older versions.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}
"""Classes of which a file may make instances and fill their attributes."""

_VALUES = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("builtins", "set"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath")),
}
"""What it may call besides: each makes a value, or finds one that is not the file's to change."""


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
        UnsupportedError: the file names anything else, sets attributes of anything but the records that it makes, or is
            no whole pickle, and the user does not vouch for it; nothing of it has run.
    """
    if safe_load.trusted():
        return pickle.load(file)
    name = str(getattr(file, "name", ".metadata"))
    try:
        return _Unpickler(file).load()
    except _Refusal as refusal:
        raise UnsupportedError(
            setting="checkpoint",
            value=name,
            why=f"its pickle {refusal}, which no checkpoint's metadata consists of, and to load that could run code",
            remedy=f"if you trust whoever wrote the file, set {safe_load.TRUST}=1",
        ) from None
    except Exception as error:
        raise UnsupportedError(
            setting="checkpoint",
            value=name,
            why=f"it is not the metadata of a checkpoint, or is damaged ({type(error).__name__}: {error})",
            remedy="load another checkpoint",
        ) from error


class _Refusal(Exception):  # noqa: N818
    """What a file does that it may not."""


def _refused(what: str) -> Callable[[_Unpickler], NoReturn]:
    def refuse(unpickler: _Unpickler) -> NoReturn:
        raise _Refusal(what)

    return refuse


# Python's own: how the one in C sets attributes cannot be overridden. It takes a few times as long, under a second for
# ten thousand shards.
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{
            opcode[0]: _refused(what)
            for what, opcodes in {
                "refers to what is outside it": (pickle.PERSID, pickle.BINPERSID),
                # Registered codes are looked up in a cache before `find_class` is asked.
                "names objects by registered codes": (pickle.EXT1, pickle.EXT2, pickle.EXT4),
                "makes objects in ways": (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX),
                "has buffers outside it": (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
            }.items()
            for opcode in opcodes
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS or (module, name) in _VALUES:
            return super().find_class(module, name)
        # Resolving a dotted name reads attributes of attributes, which reaches any module that the first one imports.
        if module == "torch" and "." not in name and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Refusal(f"names {module}.{name}")

    def load_build(self) -> None:
        """Fills the attributes of a record that the file has made. Whatever else it names is everybody's."""
        state = self.stack.pop()
        record = self.stack[-1]
        kind = type(record)
        if (kind.__module__, kind.__qualname__) not in _RECORDS:
            raise _Refusal(f"sets attributes of {record!r:.80}")
        if hasattr(kind, "__setstate__"):
            kind.__setstate__(record, state)
            return
        if type(state) is not dict or not all(type(key) is str and not key.startswith("__") for key in state):
            raise _Refusal(f"sets attributes of a {kind.__name__} that are not its fields")
        record.__dict__.update(state)

    dispatch[pickle.BUILD[0]] = load_build
