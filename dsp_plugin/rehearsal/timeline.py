"""What was allocated and freed, in order, by whom: the most that is alive at once, and who holds it then."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

FORWARD, BACKWARD, RECOMPUTE = "forward", "backward", "recompute"


class Owner(NamedTuple):
    """What made an allocation.

    Attributes:
        module: its path in the model; empty outside of all modules.
        operator: torch's name of it; for a buffer that is made empty, also the function that made it.
        phase: `FORWARD`, `BACKWARD`, or `RECOMPUTE` for what a backward pass runs again.
    """

    module: str
    operator: str
    phase: str


NOBODY = Owner("", "", "")


class Holder(NamedTuple):
    """Allocations of one kind that are alive at one moment; layers of a list are one kind.

    Attributes:
        module, operator, phase: as in `Owner`, with ``*`` for numbers in the path.
        tensors: how many allocations.
        nbytes: of all of them.
    """

    module: str
    operator: str
    phase: str
    tensors: int
    nbytes: int


REST = "everything else"


class Layer(NamedTuple):
    """What a module holds at some moments; names are as in `Holder`.

    Attributes:
        module: or `REST`.
        events: which of the timeline. nbytes: alive after each.
    """

    module: str
    events: list[int]
    nbytes: list[int]


class Timeline:
    """Allocations in order; each has a key of its own. Bytes on the device and on the host are told apart.

    Attributes:
        marks: before which event each phase begins, and its name.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._owners: list[Owner] = []
        self._on_host: set[int] = set()
        self._changes: list[tuple[int, int]] = []
        self.marks: list[tuple[int, str]] = []

    def allocate(self, nbytes: int, owner: Owner = NOBODY, on_host: bool = False) -> int:
        """Returns the key to free it by."""
        key = len(self._sizes)
        self._sizes.append(nbytes)
        self._owners.append(owner)
        if on_host:
            self._on_host.add(key)
        self._changes.append((key, nbytes))
        return key

    def move_to_host(self, key: int) -> None:
        """An allocation is the host's, from its beginning."""
        self._on_host.add(key)

    def free(self, key: int) -> None:
        """The end of an allocation."""
        self._changes.append((key, -self._sizes[key]))

    def mark(self, phase: str) -> None:
        """A phase begins."""
        self.marks.append((len(self._changes), phase))

    def curve(self, without: Collection[int] = (), on_host: bool = False) -> list[int]:
        """Bytes alive after each event above those at the start, on the device or on the host.

        Args:
            without: keys that do not count.
        """
        return list(self._curve(without, on_host))

    def peak(self, without: Collection[int] = (), on_host: bool = False) -> int:
        """The most of `curve`."""
        return max(self._curve(without, on_host), default=0)

    def alive_before(self, phase: str, without: Collection[int] = ()) -> int:
        """Bytes alive on the device when a phase began."""
        begins = next(event for event, name in self.marks if name == phase)
        return ([0, *self._curve(without, False)])[begins]

    def layers(self, without: Collection[int] = (), most: int = 7, samples: int = 1200) -> list[Layer]:
        """`curve` of the device apart by module, for a plot: the modules that hold the most, and the rest as one.

        Args:
            most: modules told apart.
            samples: moments at most; each is the highest of a run of events.
        """
        curve = self.curve(without)
        width = max(-(-len(curve) // samples), 1)
        runs = [range(start, min(start + width, len(curve))) for start in range(0, len(curve), width)]
        moments = [max(run, key=curve.__getitem__) for run in runs]
        named = self._largest(without)[:most]
        alive = dict.fromkeys([*named, REST], 0)
        found = {name: Layer(name, [], []) for name in alive}
        wanted = iter(moments)
        moment = next(wanted, None)
        for event, (key, change) in enumerate(self._changes):
            if key not in without and key not in self._on_host:
                name = _alike(self._owners[key].module)
                alive[name if name in alive else REST] += change
            if event == moment:
                for name, layer in found.items():
                    layer.events.append(event)
                    layer.nbytes.append(alive[name])
                moment = next(wanted, None)
        return list(found.values())

    def _largest(self, without: Collection[int]) -> list[str]:
        """The modules by the most that each ever holds."""
        alive: dict[str, int] = {}
        most: dict[str, int] = {}
        for key, change in self._changes:
            if key not in without and key not in self._on_host:
                name = _alike(self._owners[key].module)
                alive[name] = alive.get(name, 0) + change
                most[name] = max(most.get(name, 0), alive[name])
        return sorted(most, key=lambda name: -most[name])

    def holders(self, without: Collection[int] = ()) -> list[Holder]:
        """Who holds the device's peak, by bytes, the largest first."""
        curve = self.curve(without)
        if not curve:
            return []
        peak = max(range(len(curve)), key=curve.__getitem__)
        alive: dict[int, int] = {}
        for key, change in self._changes[: peak + 1]:
            if change < 0 or (change == 0 and key in alive):
                alive.pop(key, None)
            elif key not in without and key not in self._on_host:
                alive[key] = change
        kinds: dict[Owner, list[int]] = {}
        for key, nbytes in alive.items():
            owner = self._owners[key]
            kinds.setdefault(owner._replace(module=_alike(owner.module)), []).append(nbytes)
        found = [Holder(*owner, len(sizes), sum(sizes)) for owner, sizes in kinds.items()]
        return sorted((holder for holder in found if holder.nbytes), key=lambda holder: -holder.nbytes)

    def _curve(self, without: Collection[int], on_host: bool) -> Iterator[int]:
        alive = 0
        for key, change in self._changes:
            if key not in without and (key in self._on_host) == on_host:
                alive += change
            yield alive


def _alike(path: str) -> str:
    """One name for all layers of a list."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
