"""What a cluster gives: compute, memory and links of its devices, by preset or by number."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dsp_plugin.errors import SequenceParallelConfigError


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. Bytes are per device and second, each way.

    Attributes:
        ranks: GPUs. node: GPUs of one node.
        flops: of dense products in bf16 per second, at most.
        product_share: of them that products with weights reach. attention_share: that attention reaches.
        device_bytes: memory of a device. host_bytes: of a node.
        intra: between devices of one node. inter: between nodes, of one device.
        host: between a device and host memory.
        memory: of device memory, for what is read and written once.
        latency: seconds that a collective takes of no bytes.
    """

    ranks: int
    node: int
    flops: float
    device_bytes: int
    host_bytes: int
    intra: float
    inter: float
    host: float
    memory: float
    product_share: float = 0.6
    attention_share: float = 0.5
    latency: float = 20e-6

    def across(self, stride: int, size: int) -> bool:
        """Whether an axis of ``size`` ranks that lie ``stride`` apart leaves a node."""
        return stride * size > self.node

    def on_one_node(self, stride: int, size: int) -> int:
        """How many ranks of such an axis one node has."""
        return min(max(self.node // stride, 1), size)


# By vendors' data sheets: dense bf16, NVLink one way, a network port of 200 (A100) or 400 Gbit/s per GPU, PCIe 4 or 5
# one way, HBM. Device memory is what drivers report, in whole GiB. Host memory is 1 TiB to a node.
_GIB = 1 << 30
PRESETS: dict[str, Cluster] = {
    "a100": Cluster(8, 8, 312e12, 79 * _GIB, 1024 * _GIB, 300e9, 25e9, 32e9, 2.0e12),
    "h100": Cluster(8, 8, 989e12, 79 * _GIB, 1024 * _GIB, 450e9, 50e9, 64e9, 3.35e12),
    "h200": Cluster(8, 8, 989e12, 139 * _GIB, 1024 * _GIB, 450e9, 50e9, 64e9, 4.8e12),
}
DEFAULT_PRESET = "h100"

_UNITS = {
    **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGTP", 1)},
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("kMGTP", 1)},
    "B": 1,
}
_BITS = {f"{prefix}bit": 10 ** (3 * power) // 8 for power, prefix in enumerate("kMGT", 1)}


def amount(text: str, option: str) -> int:
    """Bytes of ``80GiB`` or ``1.5TB``.

    Raises:
        SequenceParallelConfigError: it is none.
    """
    return _measured(text, option, _UNITS, "80GiB")


def rate(text: str, option: str) -> int:
    """Bytes per second of ``50GB/s`` or ``400Gbit/s``.

    Raises:
        SequenceParallelConfigError: it is none.
    """
    given = text.removesuffix("/s")
    if given == text:
        raise _no_amount(text, option, "50GB/s or 400Gbit/s")
    return _measured(given, option, {**_UNITS, **_BITS}, "50GB/s or 400Gbit/s")


def tokens(text: str, option: str) -> int:
    """Tokens of ``131072``, ``128K`` (of 1024) or ``1M`` (of 1024 * 1024).

    Raises:
        SequenceParallelConfigError: it is none.
    """
    return _measured(text, option, {"": 1, "K": 1 << 10, "M": 1 << 20}, "131072, 128K or 1M")


def of_size(preset: Cluster, ranks: int, node: int) -> Cluster:
    """A preset's devices, as many as there are.

    Raises:
        SequenceParallelConfigError: they make no whole nodes.
    """
    node = min(node, ranks)
    if ranks % node:
        raise SequenceParallelConfigError(
            setting="--gpus",
            value=ranks,
            why=f"nodes of {node} GPUs make no {ranks}: {ranks} / {node} leaves {ranks % node}",
            remedy="set --gpus-per-node to a divisor",
        )
    return replace(preset, ranks=ranks, node=node)


def _measured(text: str, option: str, units: dict[str, int], example: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text)
    if found is None or found[2] not in units:
        raise _no_amount(text, option, example)
    value = int(float(found[1]) * units[found[2]])
    if value < 1:
        raise _no_amount(text, option, example)
    return value


def _no_amount(text: str, option: str, example: str) -> SequenceParallelConfigError:
    return SequenceParallelConfigError(
        setting=option, value=text, why="not an amount of 1 or more with a known unit", remedy=f"write {example}"
    )
