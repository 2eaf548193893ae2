"""What `dsp-plugin doctor` finds out: versions, devices, kernels, and which methods are legal at which sizes."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels import KernelRow, describe, linear_fla
from dsp_plugin.kernels.linear_chunks import ChunkedForm
from dsp_plugin.methods import METHODS


@dataclass(frozen=True)
class Software:
    """One package or library.

    Attributes:
        version: None if it was not found.
        supported: the versions that our integration is made for; None where any will do.
        note: what a reader must know, such as why it is not used.
    """

    name: str
    version: str | None
    supported: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Legality:
    """Whether a method can run with one sequence-parallel size.

    Attributes:
        reason: why it cannot; None if it can.
    """

    method: str
    size: int
    reason: str | None


def software() -> list[Software]:
    """Versions, from package metadata: nothing that could crash is imported."""
    return [
        Software("python", platform.python_version()),
        Software("dsp-plugin", _version("dsp-plugin")),
        Software("torch", str(torch.__version__)),
        Software("CUDA", torch.version.cuda, note="" if torch.version.cuda else "this torch is built without it"),
        _nccl(),
        Software("gloo", "in torch" if dist.is_available() and dist.is_gloo_available() else None),
        _integrated("deepspeed"),
        _integrated("megatron-core"),
        _integrated("flash-attn", "flash_attn"),
        Software("flash-attn-3", _version("flash-attn-3", "flash_attn_3")),
        _integrated("fla-core", "flash-linear-attention", name="flash-linear-attention"),
        Software("triton", _version("triton", "pytorch-triton")),
        _apex(),
        Software("transformer-engine", _version("transformer-engine", "transformer-engine-torch")),
    ]


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _nccl() -> Software:
    if not (dist.is_available() and dist.is_nccl_available()):
        return Software("NCCL", None, note="this torch is built without it")
    return Software("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _integrated(distribution: str, *aliases: str, name: str | None = None) -> Software:
    version, supported = _version(distribution, *aliases), supported_versions(distribution)
    note = ""
    if version is not None and supported and not SpecifierSet(supported).contains(version, prereleases=True):
        note = f"not supported: install {distribution}{supported}"
    return Software(name or distribution, version, supported, note)


def supported_versions(distribution: str) -> str | None:
    """The versions of an upstream package that our own metadata asks for, in the extra that brings its integration."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("dsp-plugin") or ()]
    except metadata.PackageNotFoundError:
        return None
    return next((str(r.specifier) for r in requirements if r.name.lower() == distribution and r.specifier), None)


def _apex() -> Software:
    """NVIDIA Apex, told from the unrelated `apex` on PyPI by the folders it has, without importing either."""
    spec = importlib.util.find_spec("apex")
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    if any((folder / part).is_dir() for folder in folders for part in ("optimizers", "multi_tensor_apply")):
        return Software("apex (NVIDIA)", _version("apex") or "unknown version")
    note = "the installed package apex is another project, from PyPI" if spec is not None else ""
    return Software("apex (NVIDIA)", None, note=note)


def devices() -> list[str]:
    """The devices that ranks on this machine can use."""
    found = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return found


def kernels() -> list[KernelRow]:
    """The local kernels in order of preference, those of linear attention last, and why one cannot be used."""
    unusable = linear_fla.unusable(torch.device("cuda"), torch.bfloat16)
    used = "all of it here" if unusable else "where fla does not serve the tensors"
    return [
        *describe(),
        KernelRow(
            linear_fla.FlaForm.name,
            unusable is None,
            f"linear attention: {unusable or 'flash-linear-attention and triton are installed'}",
            linear_fla.version(),
        ),
        KernelRow(ChunkedForm.name, True, f"linear attention in plain torch, {used}", torch.__version__),
    ]


def legality(world_size: int, heads: int, kv_heads: int | None, tensor_parallel_size: int) -> list[Legality]:
    """Whether each method can run with each sequence-parallel size that fits the world.

    Args:
        heads: of the whole model, before tensor parallelism.
        kv_heads: likewise; ``heads`` when None.

    Raises:
        SequenceParallelConfigError: the world, the heads and the tensor-parallel size contradict each other.
    """
    if world_size % tensor_parallel_size:
        raise SequenceParallelConfigError(
            setting="tp",
            value=tensor_parallel_size,
            why=f"the world of {world_size} ranks does not split into groups of {tensor_parallel_size}",
            remedy="choose a divisor of the world size",
        )
    if heads % tensor_parallel_size:
        raise SequenceParallelConfigError(
            setting="tp",
            value=tensor_parallel_size,
            why=f"{heads} query heads do not split over {tensor_parallel_size} tensor-parallel ranks",
            remedy="choose a divisor of the head count",
        )
    left = world_size // tensor_parallel_size
    rows = []
    for method in METHODS:
        for size in (size for size in range(1, left + 1) if left % size == 0):
            reason = None
            config = SequenceParallelConfig(method=method, size=size)
            try:
                config.check_world(world_size, tensor_parallel_size=tensor_parallel_size)
                config.check_model(heads=heads, kv_heads=kv_heads, tensor_parallel_size=tensor_parallel_size)
            except SequenceParallelConfigError as error:
                reason = str(error)
            rows.append(Legality(method, size, reason))
    return rows
