"""What `import dsp_plugin` sets in motion, through the entry point group ``dsp_plugin.autoload``.

Only import hooks are registered here, so the import stays cheap: no upstream package is imported before the user
imports it. Transformers is not changed, only learnt of. Megatron is not hooked: its patches need a configuration, which
the launcher or `dsp_plugin.patches.megatron.install` gives them.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import sys

from dsp_plugin.config import told
from dsp_plugin.patches.post_import import after_import


def install() -> None:
    """Registers the hooks, once per process: importing a framework, or having imported it, installs our patches.

    One that they do not fit can be imported all the same. With the models of ``transformers`` comes who shards them.

    Raises:
        SequenceParallelConfigError: the environment has a section that is not legal.
    """
    after_import("deepspeed", _install_deepspeed)
    after_import("accelerate", _install_accelerate)
    after_import("transformers.modeling_utils", _enter_transformers)
    after_import("transformers.training_args", _install_training_arguments)
    after_import("transformers.trainer", _install_trainer)
    if told.told() is not None:
        atexit.register(_say_unserved)


def _install_deepspeed() -> None:
    importlib.import_module("dsp_plugin.patches.deepspeed").install_where_it_fits()


def _install_accelerate() -> None:
    importlib.import_module("dsp_plugin.patches.accelerate").install_where_it_fits()


def _install_training_arguments() -> None:
    importlib.import_module("dsp_plugin.patches.accelerate.trainer").install_arguments()


def _install_trainer() -> None:
    importlib.import_module("dsp_plugin.patches.accelerate.trainer").install()


def _enter_transformers() -> None:
    importlib.import_module("dsp_plugin.patches.transformers")


def _say_unserved() -> None:
    """At the end of a process that the launcher does not run, which cannot have its status changed any more."""
    if multiprocessing.parent_process() is not None or hasattr(sys, "last_type"):
        return
    problem = told.unserved()
    if problem is not None and os.environ.get("RANK", "0") == "0":
        print(f"dsp_plugin: error: {problem}", file=sys.stderr, flush=True)
