"""What a step may trade for memory: the setting ``memory``, off by default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, TypeAdapter, ValidationError

from dsp_plugin.integers import MOST

AUTO_ATTENTION_BYTES = 1 << 30
"""What ``"auto"`` lets the heads of one round of attention take on a device."""


_AMOUNT = TypeAdapter(ByteSize)


class Bytes(int):
    """An amount of memory, told from a count."""


def _count(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST:
        raise ValueError(f"expected an integer of 1 or more, not {value!r}")
    return value


def _bytes(value: Any) -> Any:
    if isinstance(value, Bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f'expected an amount such as "40GiB", not {value!r}')
    try:
        amount = Bytes(_AMOUNT.validate_python(value))
    except ValidationError:
        raise ValueError(f'expected an amount such as "40GiB", not {value!r}') from None
    if not 0 < amount <= MOST:
        raise ValueError(f"expected an amount between 1 byte and {MOST}, not {value!r}")
    return amount


def _switch_or_bytes(value: Any) -> Any:
    return value if isinstance(value, bool) else _bytes(value)


def _count_or_bytes(value: Any) -> Any:
    return _bytes(value) if isinstance(value, str | Bytes) else _count(value)


class MemoryConfig(BaseModel):
    """What a step trades for memory, part by part; each by default as it would be without the section.

    Attributes:
        tile_tokens: tokens of which the head's logits and their loss are alive at once; None for all of them.
        mlp_tiles: tiles of tokens in which an MLP, and a norm that Transformers writes out, is computed, and in the
            backward pass recomputed; 1 for whole.
        offload: whether what activation checkpointing keeps waits in host memory for its backward pass; an amount, such
            as ``"40GiB"``, is the most host memory that a rank may use for it, and what is more stays on the device.
        attention_rounds: in how many rounds of heads Ulysses (and USP's inner part) exchanges and attends; an amount,
            such as ``"2GiB"``, means as few as keep q, k, v and the output that a round gathers within it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tile_tokens: Annotated[int, BeforeValidator(_count)] | None = None
    mlp_tiles: Annotated[int, BeforeValidator(_count)] = 1
    offload: Annotated[Any, BeforeValidator(_switch_or_bytes)] = False
    attention_rounds: Annotated[Any, BeforeValidator(_count_or_bytes)] = 1

    @property
    def host_bytes(self) -> int | None:
        """The most host memory that checkpoints of one rank may take; 0 for none, None for what there is."""
        return self.offload if isinstance(self.offload, Bytes) else None if self.offload else 0

    def in_words(self) -> str:
        """What is set, such as ``tile_tokens 4096, offload``; empty where nothing is."""
        fields = type(self).model_fields
        changed = {name: getattr(self, name) for name in fields if getattr(self, name) != fields[name].default}
        return ", ".join(
            name if value is True else f"{name} {f'{value:,} bytes' if isinstance(value, Bytes) else value}"
            for name, value in changed.items()
        )
