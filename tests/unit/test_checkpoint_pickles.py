"""Checkpoints from strangers: no pickle runs code, and none changes what belongs to the whole process."""

from __future__ import annotations

import copyreg
import enum
import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches import safe_load
from dsp_plugin.patches.megatron import safe_metadata

METADATA = metadata.__name__
HOLDERS = {
    "size": torch.Size,
    "record": metadata.ChunkStorageMetadata,
    "properties": metadata.TensorProperties,
    "enumeration": metadata._MEM_FORMAT_ENCODING,
    "path": Path,
}


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def dictionary(**entries: bytes) -> bytes:
    return b"}" + b"".join(text(key) + value + b"s" for key, value in entries.items())


def slots(**entries: bytes) -> bytes:
    """The state whose second part is set with `setattr`."""
    return b"N" + dictionary(**entries) + b"\x86"


def attack(*opcodes: bytes) -> io.BytesIO:
    return io.BytesIO(b"\x80\x04" + b"".join(opcodes) + b".")


NUMBER = b"K\x07"
SIZE = named("torch", "Size")
RECORD = named(METADATA, "ChunkStorageMetadata")
MEMBER = named(METADATA, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R"
MADE = RECORD + b")\x81"
ATTACKS = {
    "a method of torch.Size": attack(SIZE, slots(numel=NUMBER), b"b"),
    "a method of a record": attack(RECORD, slots(__eq__=NUMBER), b"b"),
    "a method of a record, by a plain state": attack(RECORD, dictionary(__eq__=NUMBER), b"b"),
    "how a record is filled": attack(named(METADATA, "TensorProperties"), slots(__setstate__=RECORD), b"b"),
    "a method of Path": attack(named("pathlib", "Path"), slots(exists=NUMBER), b"b"),
    "the class, through the memo": attack(SIZE, b"\x940h\x02", slots(numel=NUMBER), b"b"),
    "a member of an enumeration": attack(MEMBER, dictionary(_value_=NUMBER), b"b"),
    "a member, by slots": attack(MEMBER, slots(_value_=NUMBER), b"b"),
    "an enumeration": attack(named(METADATA, "_MEM_FORMAT_ENCODING"), slots(name=NUMBER), b"b"),
    "a dtype": attack(named("torch", "float32"), slots(itemsize=NUMBER), b"b"),
    "a function": attack(named("torch.serialization", "_get_layout"), dictionary(cache=NUMBER), b"b"),
    "a layout": attack(
        named("torch.serialization", "_get_layout"), text("torch.strided"), b"\x85R", slots(a=NUMBER), b"b"
    ),
    "the class of a record of its own": attack(MADE, slots(__class__=SIZE), b"b"),
    "how its own record is filled": attack(MADE, dictionary(__setstate__=SIZE), b"b", dictionary(a=NUMBER), b"b"),
    "an attribute of a size": attack(SIZE, b")\x81", slots(numel=NUMBER), b"b"),
    "a persistent id": attack(text("7"), b"Q"),
    "a persistent id in text": attack(b"P7\n"),
    "an instance in the old way": attack(b"(ctorch\nSize\no"),
    "an instance of a stranger in the old way": attack(b"(ios\ngetcwd\n"),
    "keywords for __new__": attack(SIZE, b")", dictionary(), b"\x92"),
    "a buffer outside": attack(b"\x97"),
    "a function of a module": attack(named("os", "system"), text("true"), b"\x85R"),
    "a dotted name": attack(named(f"{METADATA}", "os.system"), text("true"), b"\x85R"),
    "a class of the package that is not listed": attack(named(filesystem.__name__, "FileSystemWriter"), b"0N"),
    "a record of the package that is not listed": attack(named(planner.__name__, "LoadPlan"), b"0N"),
    "getattr": attack(named("builtins", "getattr"), SIZE, text("numel"), b"\x86R"),
    "a module": attack(named("torch", "os"), slots(getcwd=NUMBER), b"b"),
    "a pickle that ends too soon": io.BytesIO(b"\x80\x04]"),
    "another file": io.BytesIO(b"\x89PNG\r\n"),
    "nothing": io.BytesIO(b""),
    "a call of what is no function": attack(MADE, b")R"),
}


def belongings() -> list[Any]:
    """What attacks are after."""
    kinds = [dict(vars(kind)) for kind in HOLDERS.values()]
    members = [dict(vars(member)) for member in metadata._MEM_FORMAT_ENCODING]
    return [*kinds, *members, dict(vars(torch.serialization._get_layout)), torch.float32.itemsize]


@pytest.mark.parametrize("name", ATTACKS)
def test_metadata_of_a_stranger_is_refused_and_changes_nothing(name: str) -> None:
    # Kept in a cache of its own by the function, whoever calls it first.
    torch.serialization._get_layout("torch.strided")
    before = belongings()
    with pytest.raises(UnsupportedError, match=r"^checkpoint='\.metadata': ") as refusal:
        safe_metadata.load(io.BytesIO(ATTACKS[name].getvalue()))
    assert belongings() == before
    assert "could run code" in str(refusal.value) or "is damaged" in str(refusal.value)


def test_a_registered_code_is_no_way_around_the_list() -> None:
    """Once resolved it is in a cache that is asked before anything is checked."""
    copyreg.add_extension("os", "getcwd", 77)  # type: ignore[arg-type]
    try:
        pickle.loads(b"\x80\x04\x82\x4d.")
        with pytest.raises(UnsupportedError, match="registered codes"):
            safe_metadata.load(attack(b"\x82\x4d)R"))
    finally:
        copyreg.remove_extension("os", "getcwd", 77)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ["os", "builtins", "torch", "subprocess", "posix"])
@pytest.mark.parametrize("name", ["system", "eval", "load", "Popen"])
def test_metadata_names_nothing_that_could_run(module: str, name: str, tmp_path: Path) -> None:
    file = attack(named(module, name), text(f"touch {tmp_path}/x"), b"\x85R")
    with pytest.raises(UnsupportedError, match=f"names {module}.{name}.*could run code.*{safe_load.TRUST}=1"):
        safe_metadata.load(file)
    assert not list(tmp_path.iterdir())


def genuine() -> metadata.Metadata:
    properties = metadata.TensorProperties(dtype=torch.bfloat16, memory_format=torch.channels_last)
    chunks = [metadata.ChunkStorageMetadata(torch.Size([2 * i, 0]), torch.Size([2, 3])) for i in range(2)]
    tensor = metadata.TensorStorageMetadata(properties, torch.Size([4, 3]), chunks)
    places = {
        metadata.MetadataIndex("weight", chunk.offsets, i): filesystem._StorageInfo(f"__{i}_0.distcp", i, 24)
        for i, chunk in enumerate(chunks)
    }
    plan = planner.SavePlan([planner.WriteItem(next(iter(places)), planner.WriteItemType.SHARD)])
    content = metadata.Metadata(
        {"weight": tensor, "step": metadata.BytesStorageMetadata()},
        {"weight": ("model", "weight"), "others": OrderedDict(a={1}), "more": defaultdict(dict, b={})},
        places,
        metadata.StorageMeta(checkpoint_id=Path("/a/b"), load_id="x"),
    )
    content.mcore_data = {"weight": {"layout": torch.strided}}  # type: ignore[attr-defined]
    content.all_local_plans = [plan]  # type: ignore[attr-defined]
    return content


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_genuine_metadata_is_read_as_upstream_reads_it(protocol: int) -> None:
    written = genuine()
    read = safe_metadata.load(io.BytesIO(pickle.dumps(written, protocol)))
    assert read == written
    assert vars(read) == vars(written)
    assert read.state_dict_metadata["weight"].properties.memory_format is torch.channels_last


class Stage(enum.Enum):
    ONE = 1


class Scaler:
    """What a framework's file holds an instance of."""


def member_changed(state: Callable[[], bytes]) -> io.BytesIO:
    """A file of torch's own kind: a pickle of protocol 2 within an archive that holds nothing else."""
    opcodes = f"c{__name__}\nStage\n".encode() + b"K\x01\x85R" + state() + b"b."
    file = io.BytesIO()
    content = b"\x80\x02" + opcodes
    archive = torch._C.PyTorchFileWriter(file)
    archive.write_record("data.pkl", content, len(content))
    archive.write_end_of_file()
    file.seek(0)
    return file


def unicode(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize("declared", [False, True], ids=["ours", "the framework's"])
@pytest.mark.parametrize(
    "state",
    [
        lambda: b"}" + unicode("_value_") + NUMBER + b"s",
        lambda: b"N}" + unicode("_value_") + NUMBER + b"s\x86",
    ],
    ids=["state", "slots"],
)
def test_no_checkpoint_changes_a_member_of_an_enumeration(state: Callable[[], bytes], declared: bool) -> None:
    """torch fills the attributes of instances of what is allowed, and members are instances."""
    before = torch.serialization.get_safe_globals()
    if declared:
        torch.serialization.add_safe_globals([Stage])
    try:
        with safe_load.only(() if declared else (Stage,)), pytest.raises(UnsupportedError, match="could run code"):
            torch.load(member_changed(state))
        assert Stage.ONE.value == 1
        assert set(torch.serialization.get_safe_globals()) == {*before, *([Stage] if declared else [])}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_members_of_allowed_enumerations_and_instances_are_read() -> None:
    file = io.BytesIO()
    scaler = Scaler()
    scaler.scale = 8.0  # type: ignore[attr-defined]
    torch.save({"stage": Stage.ONE, "scaler": scaler, "weight": torch.ones(2)}, file)
    file.seek(0)
    before = torch.serialization.get_safe_globals()
    with safe_load.only((Stage, Scaler)):
        read = torch.load(file)
        torch.serialization.add_safe_globals([Path])
    assert read["stage"] is Stage.ONE
    assert vars(read["scaler"]) == {"scale": 8.0}
    assert torch.equal(read["weight"], torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == {*before, Path}, "what was declared meanwhile stays"
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)
