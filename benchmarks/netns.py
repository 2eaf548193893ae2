"""Hosts on one machine: network namespaces joined by a veth pair, its bandwidth shaped by ``tc tbf``.

Every host runs one rank. Ranks meet through a file, and talk gloo over the link and nothing else. Nothing is created
in the namespace that this process runs in, and what is created is removed however the block ends.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "link0"
_ADDRESSES = ("10.77.0.1/24", "10.77.0.2/24")


class HostFailure(RuntimeError):  # noqa: N818
    """A command that sets up hosts failed, or a rank on one raised, died or hung."""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces and the link between them."""

    names: tuple[str, ...]

    def shape(self, megabits: int | None) -> None:
        """Limit the link to ``megabits`` per second each way; None for no limit.

        Raises:
            HostFailure: ``tc`` refuses.
        """
        for name in self.names:
            # Fails where nothing is shaped yet.
            unshape = f"tc -n {name} qdisc del dev {INTERFACE} root"
            subprocess.run(unshape.split(), capture_output=True, timeout=20, check=False)
            if megabits is not None:
                # A queue of 0.2 s: longer than TCP fills, so that nothing is dropped and sent twice.
                _command(
                    f"tc -n {name} qdisc add dev {INTERFACE} root tbf rate {megabits}mbit burst 64kb latency 200ms"
                )

    def run(self, worker: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        """``worker(*args)`` on a rank of a gloo world on each host, one thread each.

        Args:
            worker: importable here and there; what it takes and returns is pickled.
            timeout: seconds after which ranks that are still running show their stacks and end, or are killed.

        Returns:
            The results by rank.

        Raises:
            HostFailure: a rank raised, died or hung; with what it printed.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "task.pickle").write_bytes(pickle.dumps((worker, args)))
            ranks = [self._start(rank, Path(folder), timeout) for rank in range(len(self.names))]
            try:
                _await(ranks, timeout)
            finally:
                for rank in ranks:
                    if rank.poll() is None:
                        rank.kill()
                    rank.wait()
            return _results(Path(folder), ranks, timeout)

    def _start(self, rank: int, folder: Path, timeout: float) -> subprocess.Popen[bytes]:
        command = ["ip", "netns", "exec", self.names[rank], sys.executable, "-m", "benchmarks.netns_rank"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in (str(_ROOT), *sys.path) if path),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
        }
        with (folder / f"log-{rank}").open("wb") as log:
            return subprocess.Popen(
                [*command, str(folder), str(rank), str(len(self.names)), str(timeout)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=_ROOT,
            )


_ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def hosts(name: str = "bench") -> Iterator[Hosts]:
    """Two fresh hosts, joined.

    Args:
        name: of this pair among those of this process.

    Raises:
        HostFailure: a command failed; ask `why_not` first.
    """
    names = (f"dsp-{name}-{os.getpid()}-0", f"dsp-{name}-{os.getpid()}-1")
    try:
        for host in names:
            _command(f"ip netns add {host}")
        _command(f"ip -n {names[0]} link add {INTERFACE} type veth peer name {INTERFACE} netns {names[1]}")
        for host, address in zip(names, _ADDRESSES, strict=True):
            _command(f"ip -n {host} address add {address} dev {INTERFACE}")
            _command(f"ip -n {host} link set {INTERFACE} up")
            _command(f"ip -n {host} link set lo up")
        yield Hosts(names)
    finally:
        for host in names:
            # Takes the link along. One that was never made is no concern here.
            subprocess.run(["ip", "netns", "del", host], capture_output=True, timeout=20, check=False)


def why_not(shaped: bool) -> str | None:
    """Why there can be no hosts here, or no shaped link between them; None if there can.

    Returns:
        One sentence.
    """
    missing = [program for program in ("ip", *(["tc"] if shaped else [])) if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} (iproute2) not found."
    try:
        with hosts("probe") as probe:
            if shaped:
                probe.shape(100)
    except HostFailure as failure:
        return f"network namespaces are not permitted here: {failure}"
    return None


def sent_bytes() -> int:
    """Bytes that this host has put on the link so far, headers and acknowledgements included."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _command(line: str) -> None:
    done = subprocess.run(line.split(), capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise HostFailure(f"`{line}`: {(done.stderr or done.stdout).strip() or f'exit status {done.returncode}'}")


def _await(ranks: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Until all have ended; after the first failure the others get a moment to report theirs."""
    # A margin, so that ranks that hang have ended themselves and shown their stacks.
    deadline = time.monotonic() + timeout + 15.0
    failed = False
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        if not failed and any(rank.returncode for rank in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + 3.0)
        time.sleep(0.02)


def _results(folder: Path, ranks: list[subprocess.Popen[bytes]], timeout: float) -> list[Any]:
    if all(process.returncode == 0 for process in ranks):
        return [pickle.loads((folder / f"result-{rank}.pickle").read_bytes()) for rank in range(len(ranks))]
    parts = [
        f"--- rank {rank}, exit status {process.returncode}, limit {timeout:g} s\n"
        + (folder / f"log-{rank}").read_text(errors="replace")
        for rank, process in enumerate(ranks)
        if process.returncode != 0
    ]
    raise HostFailure("a rank in a network namespace failed\n" + "\n".join(parts))
