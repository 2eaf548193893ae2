"""Which sections of a foreign configuration mean ours, though they are called something else.

DeepSpeed passes over keys that it does not know, so a section by the wrong name would train unsharded without a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from dsp_plugin.methods import METHODS

DEEPSPEED_SECTION = "sequence_parallel"

# Keys of DeepSpeed's own that sound alike.
_DEEPSPEED_KEYS = ("sequence_parallel_size", "seq_parallel_communication_data_type")
# Keys that no other section has.
_OUR_KEYS = ("ulysses_size", "ring_size", "ulysses_order", "ring_gradient_dtype", "softmax_method")
_NAMES = re.compile(
    r"(ds|deepspeed|dsp|dspplugin)?"
    r"((sequences?|seqs?|context)(p|par|parallel\w*)|s(p|parallel\w*)|dspplugin|dsp)"
    r"(config\w*|cfg|conf|settings|section|args|options|opts)?"
)
_ALIKE = 0.85


def misnamed(config: Mapping[Any, Any]) -> tuple[str, Any] | None:
    """The first section of ``config`` that means ours and is not called ``sequence_parallel``, with its path.

    A section means ours by its name, in whatever case, separators and abbreviation, or by what is in it: a known
    method, or keys that only ours has. Sections inside sections are known by what is in them.
    """
    for path, key, value in _entries(config):
        if value is None or path == DEEPSPEED_SECTION or key in _DEEPSPEED_KEYS:
            continue
        if (path == key and _is_our_name(key)) or _is_our_content(key, value):
            return path, value
    return None


def _entries(config: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything but what is in our own section."""
    for key, value in config.items():
        path = f"{above}{key}"
        yield path, str(key), value
        if isinstance(value, Mapping) and path != DEEPSPEED_SECTION:
            yield from _entries(value, f"{path}.")


def _is_our_name(key: str) -> bool:
    plain = "".join(letter for letter in unicodedata.normalize("NFKC", key).casefold() if letter.isalnum())
    if _NAMES.fullmatch(plain):
        return True
    return SequenceMatcher(None, plain, DEEPSPEED_SECTION.replace("_", "")).ratio() >= _ALIKE


def _is_our_content(key: str, value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    given = {str(name).casefold(): setting for name, setting in value.items()}
    method = given.get("method")
    return (
        (isinstance(method, str) and method.casefold() in METHODS)
        or (key.casefold() in METHODS and ("size" in given or "method" in given))
        or any(name in given for name in _OUR_KEYS)
    )
