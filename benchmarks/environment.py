"""Where and when numbers were measured: what a reader needs to judge them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import dsp_plugin

ROOT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def environment(arguments: list[str]) -> dict[str, str]:
    """Command, date, versions, machine and its load before the measurement, by name.

    Args:
        arguments: of ``python -m benchmarks``.
    """
    return {
        "command": " ".join(["python -m benchmarks", *arguments]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "source": _revision(),
        "dsp_plugin": getattr(dsp_plugin, "__version__", "0.1.0"),
        "torch": f"{torch.__version__}, gloo, one thread per rank",
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}",
        "cpu": f"{_cpu_model()}, {cores()} cores",
        "system": f"{platform.system()} {platform.release()}",
        "load": f"{os.getloadavg()[0]:.2f} in the minute before",
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "--short", "HEAD")
    if not revision:
        return "not a git checkout"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "dsp_plugin", "benchmarks")
    return f"{revision} with uncommitted changes" if changed else revision
