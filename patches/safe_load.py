"""Reading checkpoints without running what is in them: a pickle may name any function, and unpickling calls it."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dsp_plugin.errors import UnsupportedError

TRUST = "DSP_PLUGIN_TRUST_CHECKPOINT"
"""Environment variable: ``1`` loads checkpoints as upstream does, running whatever code their pickles name."""

_NAMED = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL|class) ([\w.]+)")


def trusted() -> bool:
    """Whether the user vouches for the files."""
    return os.environ.get(TRUST) == "1"


@contextlib.contextmanager
def only(allowed: Sequence[Any]) -> Iterator[None]:
    """Makes every `torch.load` in the block read tensors, plain values and these classes, and nothing else.

    With them go the classes that a framework has declared safe to torch by itself.

    Where the user vouches for the files (`TRUST`), it reads whatever is in them, unless the caller asks for less.

    Args:
        allowed: classes and functions that the framework's own files hold, each harmless to call.

    Raises:
        UnsupportedError: from `torch.load`, when a file holds anything else; nothing of it has run.
    """
    upstream = torch.load

    @functools.wraps(upstream)
    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        if trusted():
            # Not left to torch, whose own default has become to refuse.
            return upstream(file, *args, **{"weights_only": False, **kwargs})
        try:
            return upstream(file, *args, **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            named = _NAMED.search(str(error))
            raise UnsupportedError(
                setting="checkpoint",
                value=getattr(file, "name", file if isinstance(file, str | os.PathLike) else type(file).__name__),
                why=f"its pickle holds {named.group(1) if named else 'what is neither a tensor nor a plain value'}, "
                "and to load that could run code",
                remedy=f"if you trust whoever wrote the file, set {TRUST}=1",
            ) from error

    torch.load = load  # type: ignore[assignment]
    try:
        with _members_kept(allowed):
            yield
    finally:
        torch.load = upstream


@contextlib.contextmanager
def _members_kept(allowed: Sequence[Any]) -> Iterator[None]:
    """Allows these, and hides from torch that what an enumeration's name gives are instances of something allowed.

    A file may fill the attributes of those, and the members of an enumeration are the whole process's.
    """
    declared = torch.serialization.get_safe_globals()
    shielded = [_value_of(found) if _is_enum(found) else found for found in (*declared, *allowed)]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(shielded)
    try:
        yield
    finally:
        since = [found for found in torch.serialization.get_safe_globals() if found not in shielded]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*declared, *since])


def _is_enum(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, enum.Enum)


def _value_of(kind: type[enum.Enum]) -> tuple[Any, str]:
    return lambda value: kind(value), f"{kind.__module__}.{kind.__qualname__}"
