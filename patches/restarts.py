"""Restarts by torchrun's elastic agent: a new start of the ranks must not read what the last one left in the store.

The agent keeps one store for all starts (pytorch issue 135712), and every key of the last one is still in it: gloo and
NCCL then connect to ranks that are dead. With one agent its count of restarts tells the starts apart. Agents of several
nodes count differently; there torchrun has to make a new store each time, which an environment variable asks for.

Some failures meet every start alike. An agent cannot be told so by a rank's status; it ends by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsp_plugin.patches.patch import Patch

AGENTS = (b"torchrun", b"torch.distributed", b"accelerate")
"""What the command line of an elastic agent holds one of."""
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def install(environment: Mapping[str, str] = os.environ) -> None:
    """Gives every start of the ranks keys of its own, where an agent's store is shared by several starts.

    Ranks of several agents are left as they are; rank 0 says on stderr how to start them so that restarts work.

    Args:
        environment: of a rank.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
        Patch(
            "keys of one start only",
            "torch.distributed.rendezvous:_create_c10d_store",
            "torch",
            ">=2.6",
            prefixing(f"dsp_plugin/start_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"),
        ).apply()
    elif environment.get("RANK") == "0" and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        print(
            f"dsp_plugin: torchrun's agents share a store that outlives a restart, so a restart can fail: export "
            f"{NEW_STORE}=1 before torchrun --rdzv-backend c10d.",
            file=sys.stderr,
            flush=True,
        )


def forgo(environment: Mapping[str, str] = os.environ) -> None:
    """Ends the agent that would start this node's ranks again, if there is one and it would; one rank a node does.

    Args:
        environment: of a rank.
    """
    allowed, used = (int(environment.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    if used >= allowed or environment.get("LOCAL_RANK") != "0":
        return
    agent = os.getppid()
    try:
        command = Path(f"/proc/{agent}/cmdline").read_bytes()
    except OSError:
        return
    # Not a shell between the two, or an init process that has taken over a rank whose agent is gone.
    if any(name in command for name in AGENTS):
        print(
            f"dsp_plugin: another start would end alike: torchrun (pid {agent}) is ended, with {allowed - used} "
            "restarts left.",
            file=sys.stderr,
            flush=True,
        )
        os.kill(agent, signal.SIGTERM)


def prefixing(prefix: str) -> Callable[[Callable[..., dist.Store]], Callable[..., dist.Store]]:
    """Puts a prefix before every key of the store that torch.distributed starts from."""

    def make(upstream: Callable[..., dist.Store]) -> Callable[..., dist.Store]:
        @wraps(upstream)
        def create(*args: Any, **kwargs: Any) -> dist.Store:
            return dist.PrefixStore(prefix, upstream(*args, **kwargs))

        return create

    return make
