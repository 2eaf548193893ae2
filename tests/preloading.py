"""What the ranks of `dsp_plugin.spawn` have imported before they start.

A rank imports the module of its test, and all that this imports takes longer than most tests. The server that ranks are
forked from imports it once.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

# torch imports dynamo when something is first checkpointed; it and the two below are the most of what
# `import megatron.core` takes. Megatron itself is imported by each test under its own patches.
EVERYWHERE = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed._tensor",
    "dsp_plugin",
    "dsp_plugin.cli",
    "dsp_plugin.rehearsal.validate",
    "hypothesis",
    "typer.testing",
    "pytest",
)


def preload(*modules: str) -> None:
    """Starts a server that imports `modules`, too, in place of the one that tests elsewhere may have started."""
    forkserver._forkserver._stop()
    multiprocessing.get_context("forkserver").set_forkserver_preload([*EVERYWHERE, *modules])
    forkserver.ensure_running()
