"""What `import dsp_plugin` sets in motion, through the entry point group ``dsp_plugin.autoload``.

Only import hooks are registered here, so the import stays cheap: no upstream package is imported before the user
imports it. Transformers is not changed, only learnt of. Megatron is not hooked: its patches need a configuration, which
the launcher or `dsp_plugin.patches.megatron.install` gives them.
"""

from __future__ import annotations

import importlib

from dsp_plugin.patches.post_import import after_import


def install() -> None:
    """Registers the hooks, once per process: importing ``deepspeed``, or having imported it, installs our patches.

    A DeepSpeed that they do not fit can be imported all the same. With the models of ``transformers`` comes who shards
    them.
    """
    after_import("deepspeed", _install_deepspeed)
    after_import("transformers.modeling_utils", _enter_transformers)


def _install_deepspeed() -> None:
    importlib.import_module("dsp_plugin.patches.deepspeed").install_where_it_fits()


def _enter_transformers() -> None:
    importlib.import_module("dsp_plugin.patches.transformers")
