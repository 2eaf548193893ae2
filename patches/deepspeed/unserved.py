"""A DeepSpeed that the patches do not fit: it works as ever, and only a config that asks for us is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from dsp_plugin.config.schema import DEEPSPEED_SECTION
from dsp_plugin.config.section_names import misnamed
from dsp_plugin.errors import PatchError
from dsp_plugin.patches.deepspeed.versions import DISTRIBUTION
from dsp_plugin.patches.patch import Patch

_TARGET = "deepspeed.runtime.config:DeepSpeedConfig.__init__"


def refusal(why: PatchError | None = None) -> Patch:
    """What refuses our section where a config is read, which every version does in the same place.

    Args:
        why: the patches could not be applied; None to look the patch up, or to revert it.
    """

    def make(upstream: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstream)
        def refusing(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            if _asks_for_us(config):
                raise PatchError(
                    f'the config has a "{DEEPSPEED_SECTION}" section, which this DeepSpeed cannot honour: {why}'
                )
            upstream(self, config, *args, **kwargs)

        return refusing

    return Patch("refuse the section of an unserved DeepSpeed", _TARGET, DISTRIBUTION, ">=0", make, ("self", "config"))


def _asks_for_us(config: Any) -> bool:
    """Whether a config, or a file of one, has our section. DeepSpeed says itself what is wrong with any other."""
    if isinstance(config, str):
        try:
            with open(config, encoding="utf-8") as file:
                config = json.load(file)
        except (OSError, ValueError):
            return False
    return isinstance(config, Mapping) and (config.get(DEEPSPEED_SECTION) is not None or misnamed(config) is not None)
