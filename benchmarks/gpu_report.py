"""``make gpu``: all tests that need a GPU, then benchmarks, and a report of what they said."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment

FOLDER = ROOT / "build" / "gpu"
# Of a step what it is called, and what Python is to run.
STEPS = {
    "tests": ("-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "--timeout", "1200"),
    "attention": ("-m", "benchmarks", "--only", "attention", "--output", str(FOLDER)),
    "overlap": ("-m", "benchmarks", "--only", "overlap", "--output", str(FOLDER)),
    "memory": ("-m", "benchmarks", "--only", "memory_slopes", "--output", str(FOLDER)),
    "hot path": ("-m", "benchmarks", "--only", "hot_path", "--output", str(FOLDER)),
}


def devices() -> list[str]:
    """Name and memory of each that is visible."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.1f} GiB" for device in found]


def driver() -> str:
    """Its version; empty where nvidia-smi is not there."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return ""


def main() -> int:
    """Returns the exit status: 0; 1 where a step failed; 2 without a device."""
    if not torch.cuda.is_available():
        print(f"no CUDA device is visible to torch {torch.__version__}: nothing was run", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "devices": devices(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "environment": environment(sys.argv[1:]),
        "steps": {name: _run(arguments) for name, arguments in STEPS.items()},
    }
    write(report, FOLDER)
    print(f"written to {FOLDER}/report.md")
    return int(any(step["status"] for step in report["steps"].values()))


def _run(arguments: tuple[str, ...]) -> dict[str, Any]:
    started = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {
        "command": " ".join(["python", *arguments]),
        "status": done.returncode,
        "seconds": round(time.monotonic() - started),
        "last_lines": lines[-30:],
    }


def write(report: dict[str, Any], folder: Path) -> None:
    """As JSON and as a page."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    facts = {key: report[key] for key in ("devices", "driver", "cuda")} | report["environment"]
    lines = ["# What ran on a GPU", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for name, step in report["steps"].items():
        outcome = "passed" if step["status"] == 0 else f"failed, status {step['status']}"
        lines += [f"## {name}: {outcome}, {step['seconds']} s", "", f"`{step['command']}`", "", "```"]
        lines += [*step["last_lines"], "```", ""]
    (folder / "report.md").write_text("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
