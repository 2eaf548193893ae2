"""NCCL's rules, checked over what every rank of a world asked it for.

A communicator runs what it is asked for in order, on a stream of its own; a call starts when the caller's stream comes
to it, which is after every transfer that this stream has waited for, and ends when all that take part have come to it.
Sends are not buffered. Sends and receives that are posted together are one call. A communicator is made by its first
call, for which every one of its ranks has to come, with its host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

Kind = Literal["all_to_all", "all_gather", "all_reduce", "point_to_point", "wait"]


class Posted(NamedTuple):
    """What one rank asked of NCCL, or when it waited for it.

    Attributes:
        kind: ``point_to_point`` for sends and receives posted together; ``wait`` for the wait for a call.
        ranks: the global ranks of the communicator.
        sends: ``(global rank, bytes)``, in the order posted.
        receives: the same of what is expected.
        key: of a call, and of the wait for it.
    """

    kind: Kind
    ranks: tuple[int, ...]
    sends: tuple[tuple[int, int], ...]
    receives: tuple[tuple[int, int], ...]
    key: int


class Fault(NamedTuple):
    """A rule that is broken.

    Attributes:
        rule: ``unmatched``: a send that nobody receives, or the other way round. ``size``: of another size.
            ``collective``: ranks call different ones. ``absent``: a collective that some ranks never call.
            ``deadlock``: calls wait for each other. ``order``: they do where a device runs one call at a time, because
            ranks enqueue those of two communicators in different orders. ``never joined``: a communicator that some of
            its ranks never use, so that it is never made. ``first use``: communicators that are made in different
            orders.
        ranks: of the communicator; empty where there are more.
        what: in words.
    """

    rule: str
    ranks: tuple[int, ...]
    what: str


Call = tuple[int, int]
"""A rank, and the place of a call among its calls."""


class _Calls(NamedTuple):
    """All calls of the world.

    Attributes:
        posted: by call.
        waited: of every call those that its rank's stream had waited for before.
        before: of every call the one before it on its communicator.
    """

    posted: dict[Call, Posted]
    waited: dict[Call, frozenset[Call]]
    before: dict[Call, Call]


def check(world: Mapping[int, Sequence[Posted]], *, warmed: bool = False) -> list[Fault]:
    """The rules that the traces of the ranks break; none where NCCL would get through.

    Args:
        world: by global rank, in the order of the host.
        warmed: all communicators have been used by all their ranks before.
    """
    calls = _calls(world)
    faults, partners = _matched(calls)
    stuck = _stuck(calls, partners, lambda call: calls.waited[call] | _one(calls.before.get(call)))
    if stuck:
        faults.append(Fault("deadlock", (), _told(stuck, calls)))
    else:
        # A device has room for one call at a time, in the worst case: it takes them as they were enqueued.
        serial = _stuck(calls, partners, lambda call: calls.waited[call] | _one(_earlier(call)))
        if serial:
            faults.append(Fault("order", (), _told(serial, calls)))
    return faults if warmed else [*faults, *_made_by_all(world)]


def _calls(world: Mapping[int, Sequence[Posted]]) -> _Calls:
    calls = _Calls({}, {}, {})
    for rank, trace in world.items():
        waited: set[Call] = set()
        latest: dict[tuple[int, ...], Call] = {}
        by_key: dict[int, Call] = {}
        for posted in trace:
            if posted.kind == "wait":
                waited.add(by_key[posted.key])
                continue
            assert posted.key not in by_key
            call = rank, len(by_key)
            by_key[posted.key] = call
            calls.posted[call] = posted
            calls.waited[call] = frozenset(waited)
            if posted.ranks in latest:
                calls.before[call] = latest[posted.ranks]
            latest[posted.ranks] = call
    return calls


def _matched(calls: _Calls) -> tuple[list[Fault], dict[Call, set[Call]]]:
    """What does not fit, and for every call those of other ranks that it has to meet."""
    faults: list[Fault] = []
    partners: dict[Call, set[Call]] = defaultdict(set)
    sends: dict[tuple[tuple[int, ...], int, int], list[tuple[Call, int]]] = defaultdict(list)
    receives: dict[tuple[tuple[int, ...], int, int], list[tuple[Call, int]]] = defaultdict(list)
    collectives: dict[tuple[int, ...], dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for call, posted in calls.posted.items():
        rank = call[0]
        if posted.kind != "point_to_point":
            collectives[posted.ranks][rank].append(call)
            continue
        for peer, size in posted.sends:
            sends[posted.ranks, rank, peer].append((call, size))
        for peer, size in posted.receives:
            receives[posted.ranks, peer, rank].append((call, size))
    for way in sorted({*sends, *receives}):
        ranks, source, target = way
        for sent, received in zip_longest(sends[way], receives[way]):
            if sent is None or received is None:
                lone, verb = (received, "expects from") if sent is None else (sent, "sends to")
                here, there = (target, source) if sent is None else (source, target)
                what = f"rank {here} {verb} rank {there} {lone[1]} bytes, which does not"
                faults.append(Fault("unmatched", ranks, what))
                # Nobody will ever come.
                partners[lone[0]].add((there, -1))
                continue
            if sent[1] != received[1]:
                what = f"rank {source} sends {sent[1]} bytes to rank {target}, which expects {received[1]}"
                faults.append(Fault("size", ranks, what))
            partners[sent[0]].add(received[0])
            partners[received[0]].add(sent[0])
    for ranks, by_rank in collectives.items():
        for index in range(max(map(len, by_rank.values()))):
            met = {rank: by_rank[rank][index] for rank in ranks if index < len(by_rank[rank])}
            faults += _collective(ranks, index, met, calls)
            for rank, call in met.items():
                partners[call] |= {met.get(peer, (peer, -1)) for peer in ranks if peer != rank}
    return faults, partners


def _collective(ranks: tuple[int, ...], index: int, here: dict[int, Call], calls: _Calls) -> Iterator[Fault]:
    absent = [rank for rank in ranks if rank not in here]
    if absent:
        yield Fault("absent", ranks, f"collective {index} is called by ranks {sorted(here)}, and never by {absent}")
    kinds = {rank: calls.posted[call].kind for rank, call in here.items()}
    if len(set(kinds.values())) > 1:
        yield Fault("collective", ranks, f"collective {index} is {kinds}")
        return
    for source in here:
        sends = dict(calls.posted[here[source]].sends)
        for target in here:
            expected = dict(calls.posted[here[target]].receives)[source]
            if sends[target] != expected:
                what = f"in collective {index} rank {source} sends {sends[target]} bytes to rank {target}"
                yield Fault("size", ranks, f"{what}, which expects {expected}")


def _stuck(calls: _Calls, partners: Mapping[Call, set[Call]], after: Callable[[Call], frozenset[Call]]) -> list[Call]:
    """The calls that never end, when each starts after those that it is told to wait for."""
    needs = {call: after(call) for call in calls.posted}
    started: set[Call] = set()
    ended: set[Call] = set()
    moving = True
    while moving:
        starting = {call for call, first in needs.items() if call not in started and first <= ended}
        started |= starting
        ending = {call for call in started - ended if partners.get(call, set()) <= started}
        ended |= ending
        moving = bool(starting or ending)
    return [call for call in calls.posted if call not in ended]


def _earlier(call: Call) -> Call | None:
    rank, index = call
    return (rank, index - 1) if index else None


def _one(call: Call | None) -> frozenset[Call]:
    return frozenset() if call is None else frozenset([call])


def _told(stuck: list[Call], calls: _Calls) -> str:
    """The first call of every rank that does not end."""
    first: dict[int, Call] = {}
    for call in stuck:
        first.setdefault(call[0], call)
    lines = []
    for rank, call in sorted(first.items()):
        posted = calls.posted[call]
        peers = sorted({peer for peer, _ in (*posted.sends, *posted.receives)} - {rank})
        lines.append(f"rank {rank} in its call {call[1]}, {posted.kind} of {list(posted.ranks)} with {peers}")
    return f"{len(stuck)} of {len(calls.posted)} calls never end: " + "; ".join(lines)


def _made_by_all(world: Mapping[int, Sequence[Posted]]) -> Iterator[Fault]:
    """Communicators that are not made: their ranks do not all come, or wait for each other in two."""
    firsts = {
        rank: list(dict.fromkeys(posted.ranks for posted in trace if posted.kind != "wait"))
        for rank, trace in world.items()
    }
    used = dict.fromkeys(ranks for order in firsts.values() for ranks in order)
    for ranks in list(used):
        absent = [rank for rank in ranks if ranks not in firsts[rank]]
        if absent:
            yield Fault("never joined", ranks, f"ranks {absent} never use the communicator of {list(ranks)}")
            del used[ranks]
    waiting = {rank: [ranks for ranks in order if ranks in used] for rank, order in firsts.items()}
    made = True
    while made:
        made = False
        for ranks in used:
            if all(waiting[rank][:1] == [ranks] for rank in ranks):
                for rank in ranks:
                    waiting[rank].pop(0)
                made = True
    if any(waiting.values()):
        said = {rank: [list(ranks) for ranks in order] for rank, order in waiting.items() if order}
        yield Fault("first use", (), f"communicators are first used in different orders, by rank: {said}")
