"""What the ranks of `dsp_plugin.spawn` have imported before they start.

A rank imports the module of its test, and all that this imports takes longer than most tests. The server that ranks are
forked from imports it once.
"""

from __future__ import annotations

from multiprocessing import forkserver

from dsp_plugin.spawn import PRELOADED

# torch imports dynamo when something is first checkpointed; it and the two below are the most of what
# `import megatron.core` takes. Megatron itself is imported by each test under its own patches.
EVERYWHERE = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed._tensor",
    "dsp_plugin.cli.app",
    "dsp_plugin.rehearsal.validate",
    "hypothesis",
    "typer.testing",
    "pytest",
)


def preload(*modules: str) -> None:
    """Has the next rank forked from a server that imports `modules`, too."""
    PRELOADED.extend(name for name in (*EVERYWHERE, *modules) if name not in PRELOADED)
    # Tests elsewhere may have started one without them.
    forkserver._forkserver._stop()
