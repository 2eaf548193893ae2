"""Builds and loads `guard.cpp`: a CUDA device that does nothing, for torch's fake tensors. Imports no torch.

Run as a file, ``guard.py LIBRARY MODULE ARGUMENTS``, it loads the guard and then runs a module as Python's ``-m`` does:
torch asks once, as it starts, whether there is a CUDA device, and to import this file from its package would start it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
_BUILD_SECONDS = 240


def compiler() -> str | None:
    """A C++ compiler of this machine; None where it has none."""
    return next((found for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if (found := _which(name))), None)


def _which(name: str | None) -> str | None:
    return None if not name else shutil.which(name)


def library() -> Path:
    """Where the guard for this torch and interpreter lies once it is built."""
    told = (SOURCE.read_bytes(), metadata.version("torch").encode(), sys.version.encode(), str(_torch()).encode())
    name = hashlib.sha256(b"\0".join(told)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dsp_plugin" / f"cuda_guard_{name}.so"


def built() -> Path:
    """The guard, compiled if it is not there yet: ten seconds, once for a torch.

    There is no lock to be left behind: who comes at the same time compiles it, too, and the last one replaces it whole.

    Raises:
        RuntimeError: it cannot be compiled, with what the compiler said.
    """
    target, command = library(), compiler()
    if target.exists():
        return target
    if command is None:
        raise RuntimeError("no C++ compiler is found: set CXX, or install g++")
    target.parent.mkdir(parents=True, exist_ok=True)
    include, libraries = _torch() / "include", _torch() / "lib"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        flags = ("-O0", "-w", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-L{libraries}")
        try:
            done = subprocess.run(
                [command, *flags, str(SOURCE), "-o", str(made), "-lc10", "-ltorch_cpu"],
                capture_output=True,
                text=True,
                timeout=_BUILD_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command} has not compiled {SOURCE} in {_BUILD_SECONDS} seconds") from None
        if done.returncode:
            raise RuntimeError(f"{command} does not compile {SOURCE}:\n{done.stderr[-2000:]}")
        made.replace(target)
    return target


def load(path: Path) -> ctypes.CDLL:
    """The guard in this process, which must not have imported torch yet; imports it.

    Autograd starts a thread for each device in the first backward pass.
    """
    assert "torch" not in sys.modules, "too late: torch has looked for devices"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    guard = loaded(path)
    importlib.import_module("torch")
    guard.become_the_device()
    return guard


def loaded(path: Path) -> ctypes.CDLL:
    """What `load` has loaded from there."""
    guard = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    for function in (guard.current_stream_id, guard.host_waits):
        function.restype = ctypes.c_int64
    return guard


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


if __name__ == "__main__":
    # Of this folder, which Python has put in front, no file is a module by itself.
    del sys.path[0]
    load(Path(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
