"""Runs of the jobs and starters in launch/jobs/, with stand-ins for what a cluster has and a test machine has not.

A stand-in is an executable on the PATH that runs on this machine, once per node, the command that it was asked to run
there: so the command lines are the real ones, from the starter down to the ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "launch" / "jobs"
EXAMPLES = ROOT / "launch" / "examples"

STAND_INS = {
    # Once per node, in the environment of the caller, as srun exports it.
    "srun": """
while [[ $1 == -* ]]; do
    case $1 in --nodes) nodes=$2; shift 2;; *) shift;; esac
done
for node in $(seq 0 $((nodes - 1))); do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & jobs+=($!); done
status=0
for job in "${jobs[@]}"; do wait "$job" || status=$?; done
exit $status
""",
    "scontrol": '[ "$1 $2" = "show hostnames" ] && tr , "\\n" <<< "$3"',
    # In an empty environment, as a login over ssh has; %n is the number of the host.
    "pdsh": """
while [[ $1 == -* ]]; do
    case $1 in -w) hosts=(${2//,/ }); shift 2;; -f) shift 2;; *) shift;; esac
done
for node in "${!hosts[@]}"; do
    command="$*"
    env -i PATH="$PATH" HOME="$HOME" bash -c "${command//%n/$node}" & jobs+=($!)
done
status=0
for job in "${jobs[@]}"; do wait "$job" || status=$?; done
exit $status
""",
    "ssh": 'while [[ $1 == -* ]]; do shift 2; done; shift; exec "$@"',
}


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Variables of a shell where the package's interpreter and the stand-ins come first, with `settings`.

    Args:
        folder: gets the stand-ins.
    """
    binaries = folder / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    for name, body in STAND_INS.items():
        path = binaries / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DSP_PLUGIN_", "SLURM_"))}
    path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), kept["PATH"]])
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1"}
    return {**kept, **quiet, "PATH": path, "DSP_PLUGIN_CPU": "1", "DS_ACCELERATOR": "cpu", **settings}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def shell(*command: str, env: Mapping[str, str], copies: int = 1, timeout: float = 240.0) -> str:
    """Runs a command with bash, from the top of the repository.

    Args:
        copies: of the command, at the same time: what somebody starts on several nodes.

    Returns:
        What all of them printed.

    Raises:
        AssertionError: one failed, or they took longer than `timeout` seconds; with the end of what they printed.
    """
    started = [
        subprocess.Popen(
            ["bash", *command],
            cwd=ROOT,
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for _ in range(copies)
    ]
    printed, hung = [], False
    try:
        for process in started:
            try:
                printed.append(process.communicate(timeout=timeout)[0])
            except subprocess.TimeoutExpired:
                hung = True
                # Faulthandler prints a rank's stacks on SIGABRT.
                os.killpg(process.pid, signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    printed.append(process.communicate(timeout=10)[0])
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    output = "\n".join(printed)
    assert not hung, f"{' '.join(command)} hung for {timeout:g} s:\n{output[-20000:]}"
    assert all(process.returncode == 0 for process in started), f"{' '.join(command)} failed:\n{output[-20000:]}"
    return output
