"""Any number of hosts on one machine: network namespaces on a bridge, every link's bandwidth shaped both ways.

As in `netns`, nothing is created in the namespace that this process runs in, and all is removed however a block ends.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.netns import INTERFACE, HostFailure, Hosts


@dataclass(frozen=True)
class Switch:
    """Hosts, and the namespace that holds the bridge between them."""

    hosts: Hosts
    name: str

    def shape(self, megabits: int | None) -> None:
        """Limit what every host sends, and what it receives, to ``megabits`` per second each; None for no limit.

        Raises:
            HostFailure: ``tc`` refuses.
        """
        self.hosts.shape(megabits)
        for port in range(len(self.hosts.names)):
            subprocess.run(
                f"tc -n {self.name} qdisc del dev port{port} root".split(), capture_output=True, timeout=20, check=False
            )
            if megabits is not None:
                # Several hosts may send to one: a queue of 2 s, so that the switch drops nothing.
                _command(
                    f"tc -n {self.name} qdisc add dev port{port} root tbf rate {megabits}mbit burst 64kb latency 2s"
                )

    def shape_nodes(self, node: int, within: int, between: int) -> None:
        """Limit what every host sends to the hosts of its node, ``node`` neighbours, and to all others.

        Args:
            within, between: megabits per second, in all to hosts of either kind.

        Raises:
            HostFailure: ``tc`` refuses.
        """
        self.shape(None)
        for host, name in enumerate(self.hosts.names):
            tc = f"tc -n {name}"
            _command(f"{tc} qdisc add dev {INTERFACE} root handle 1: htb default 20")
            _command(f"{tc} class add dev {INTERFACE} parent 1: classid 1:10 htb rate {within}mbit burst 64kb")
            _command(f"{tc} class add dev {INTERFACE} parent 1: classid 1:20 htb rate {between}mbit burst 64kb")
            first = host // node * node
            for peer in range(first, first + node):
                _command(
                    f"{tc} filter add dev {INTERFACE} protocol ip parent 1: prio 1 u32 match ip dst "
                    f"{_address(peer)}/32 flowid 1:10"
                )


@contextmanager
def switched(count: int) -> Iterator[Switch]:
    """``count`` fresh hosts on a switch.

    Raises:
        HostFailure: a command failed; ask `netns.why_not` first.
    """
    switch = f"dsp-switch-{os.getpid()}"
    names = tuple(f"dsp-switched-{os.getpid()}-{host}" for host in range(count))
    try:
        _command(f"ip netns add {switch}")
        _command(f"ip -n {switch} link add bridge0 type bridge")
        _command(f"ip -n {switch} link set bridge0 up")
        for port, host in enumerate(names):
            _command(f"ip netns add {host}")
            _command(f"ip -n {host} link add {INTERFACE} type veth peer name port{port} netns {switch}")
            _command(f"ip -n {switch} link set port{port} master bridge0")
            _command(f"ip -n {switch} link set port{port} up")
            _command(f"ip -n {host} address add {_address(port)}/24 dev {INTERFACE}")
            _command(f"ip -n {host} link set {INTERFACE} up")
            _command(f"ip -n {host} link set lo up")
        yield Switch(Hosts(names), switch)
    finally:
        for name in (*names, switch):
            # One that was never made is no concern here.
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


def _address(host: int) -> str:
    return f"10.78.0.{host + 1}"


def _command(line: str) -> None:
    done = subprocess.run(line.split(), capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise HostFailure(f"`{line}`: {(done.stderr or done.stdout).strip() or f'exit status {done.returncode}'}")
