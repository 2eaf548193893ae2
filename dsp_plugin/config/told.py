"""The section that a whole run is told, for scripts whose frameworks have no config to write it into.

It is kept in the environment, as what a script starts itself has to have it, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dsp_plugin.config.schema import DEEPSPEED_SECTION, SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError

OPTION = "--sequence-parallel"
VARIABLE = "DSP_PLUGIN_SECTION"

_settled: set[str] = set()


def section_text(given: str) -> str:
    """The section, as JSON text, that an option names or spells out.

    Args:
        given: path of a JSON file, or JSON that begins with ``{``.

    Raises:
        SequenceParallelConfigError: it cannot be read, or is no legal section.
    """
    text = given
    if not given.lstrip().startswith("{"):
        try:
            text = Path(given).read_text()
        except (OSError, ValueError) as error:
            raise SequenceParallelConfigError(
                setting=OPTION,
                value=given,
                why=f"no file can be read there: {getattr(error, 'strerror', None) or error}",
                remedy="""name a JSON file, or write the section itself, '{"method": "ulysses", "size": 4}'""",
            ) from None
    section = _loaded(text, f"{OPTION} {given}")
    SequenceParallelConfig.parse(section, source=OPTION)
    return json.dumps(section)


def told() -> SequenceParallelConfig | None:
    """The section of this run; None where it was not told one.

    Raises:
        SequenceParallelConfigError: the variable holds no legal section.
    """
    text = os.environ.get(VARIABLE)
    return None if text is None else _parsed(text)


def tell(text: str) -> None:
    """Tell this process, and those that it starts, a section in JSON.

    Raises:
        SequenceParallelConfigError: it was told another one.
    """
    before = told()
    if before is not None and before != _parsed(text):
        raise SequenceParallelConfigError(
            setting=OPTION,
            value=text,
            why=f"the environment has {VARIABLE}={os.environ[VARIABLE]}, which is another section",
            remedy=f"unset {VARIABLE}, or drop {OPTION}",
        )
    os.environ[VARIABLE] = text


def refuse_beside_deepspeed(ds_config: Mapping[str, Any]) -> None:
    """DeepSpeed's is the section of its config.

    Raises:
        SequenceParallelConfigError: the run was told one.
    """
    if told() is None:
        return
    twice = DEEPSPEED_SECTION in ds_config
    raise SequenceParallelConfigError(
        setting=f"{OPTION} ({VARIABLE})",
        why="this run trains under DeepSpeed, whose config "
        + (f'has a "{DEEPSPEED_SECTION}" section as well' if twice else "is where its section belongs"),
        remedy=f"drop {OPTION} and unset {VARIABLE}"
        + ("" if twice else f', and write "{DEEPSPEED_SECTION}" into the DeepSpeed config'),
    )


def settle() -> None:
    """Note that nobody has to ask whether a model was sharded by the section: one was, or the run has failed."""
    _settled.add(VARIABLE)


def unserved() -> str | None:
    """What is wrong where a run ends and no model was sharded by its section; None where that is settled.

    Asked again, it is.

    Raises:
        SequenceParallelConfigError: as `told`.
    """
    if told() is None or _settled:
        return None
    settle()
    return (
        f"{OPTION} ({VARIABLE}) gave this run a section, but no model was sharded by it: none went through "
        "accelerate's Accelerator.prepare, which Transformers' Trainer calls. What was trained was trained unsharded. "
        f"Prepare the model; or drop {OPTION}, and call dsp_plugin.parallelize in the script (docs/pytorch.md)"
    )


@cache
def _parsed(text: str) -> SequenceParallelConfig:
    return SequenceParallelConfig.parse(_loaded(text, VARIABLE), source=VARIABLE)


def _loaded(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise SequenceParallelConfigError(
            setting=source,
            why=f"it is not JSON: {error}",
            remedy="""write a section such as {"method": "ulysses", "size": 4}""",
        ) from None
