"""Claims about the ring's schedule, played through in pure Python: what is needed, sent, read and added up."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise

import pytest
import torch
from counted_lines import lines as _lines
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfigError
from dsp_plugin.kernels.blocks import blocks
from dsp_plugin.kernels.reference import dense_mask
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.methods.ring_schedule import RingSchedule
from dsp_plugin.methods.usp import gathered_tokens

CAUSAL, FULL = MaskSpec(causal=True), MaskSpec()


def schedule_of(layout: Layout, mask: MaskSpec) -> RingSchedule:
    return RingSchedule(tuple(layout.spans(rank) for rank in range(layout.size)), mask)


def positions(layout: Layout) -> list[list[int]]:
    return [layout.position_ids(rank).tolist() for rank in range(layout.size)]


def picked(tokens: list, slices: tuple[slice, ...]) -> list:
    return [token for run in slices for token in tokens[run]]


@st.composite
def placements(draw) -> tuple[Layout, MaskSpec]:
    lengths = draw(st.lists(st.integers(0, 23), min_size=1, max_size=5))
    borders = (0, *accumulate(lengths))
    kind = draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    by_document = kind == "zigzag" and draw(st.booleans())
    sides = st.one_of(st.none(), st.integers(0, 30))
    window = draw(st.one_of(st.none(), st.tuples(sides, sides)))
    mask = MaskSpec(draw(st.booleans()), window, borders if draw(st.booleans()) else None)
    layout = Layout(kind, borders[-1], draw(st.integers(1, 9)), documents=borders if by_document else None)
    return layout, mask


def play(schedule: RingSchedule, local: list[list[int]]) -> tuple[list[list[list[int]]], Counter]:
    """Move tokens as the schedule says, from rank to rank. Returns what each holds after every hop, and tokens sent."""
    size = schedule.size
    held = [list(tokens) for tokens in local]
    history = [[list(tokens)] for tokens in local]
    sent: Counter = Counter()
    for distance in range(size - 1):
        mail: dict[tuple[int, int], list[int]] = {}
        for rank in range(size):
            hop = schedule.hops(rank)[distance]
            for peer, tokens in (
                (schedule.next(rank), picked(held[rank], hop.on)),
                (hop.reader, picked(local[rank], hop.jumps)),
            ):
                if tokens:
                    assert peer != rank
                    assert (rank, peer) not in mail, "two buffers for one peer"
                    mail[rank, peer] = tokens
                    sent[rank] += len(tokens)
        upcoming = []
        for rank in range(size):
            hop, then = schedule.hops(rank)[distance], schedule.hops(rank)[distance + 1]
            tokens: list[int | None] = [None] * then.tokens
            for peer, slices in ((schedule.before(rank), hop.passed), (then.source, hop.jumped)):
                if slices:
                    for place, token in zip(
                        picked(list(range(then.tokens)), slices), mail.pop((peer, rank)), strict=True
                    ):
                        assert tokens[place] is None
                        tokens[place] = token
            assert None not in tokens
            upcoming.append(tokens)
        assert not mail, "sent, and nobody receives it"
        held = upcoming
        for rank in range(size):
            history[rank].append(held[rank])
    return history, sent


@settings(max_examples=150, deadline=None, derandomize=True)
@given(placement=placements())
def test_every_visible_pair_is_computed_once_with_keys_that_are_there(placement):
    layout, mask = placement
    schedule, local = schedule_of(layout, mask), positions(layout)
    history, _ = play(schedule, local)
    computed = torch.zeros(layout.length, layout.length, dtype=torch.int64)
    for rank in range(layout.size):
        for hop, held in zip(schedule.hops(rank), history[rank], strict=True):
            for work in hop.work:
                assert local[rank][work.q] == list(work.q_positions)
                assert held[work.k] == list(work.k_positions)
                found = blocks(MaskSpec(mask.causal, mask.window), work.q_positions, work.k_positions)
                assert found, "work without a visible pair"
                for block in found:
                    q, k = list(work.q_positions[block.q]), list(work.k_positions[block.k])
                    seen = block.visible("cpu")
                    for row, position in enumerate(q):
                        computed[position, torch.tensor(k)[seen[row]]] += 1
    everything = torch.arange(layout.length)
    assert torch.equal(computed, dense_mask(mask, everything, everything).long())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(placement=placements())
def test_nothing_is_sent_that_nobody_reads_and_nothing_twice(placement):
    layout, mask = placement
    schedule, local = schedule_of(layout, mask), positions(layout)
    history, sent = play(schedule, local)
    deliveries = 0
    for rank in range(layout.size):
        for hop, held in list(zip(schedule.hops(rank), history[rank], strict=True))[1:]:
            read = {place for work in hop.work for place in range(work.k.start, work.k.stop)}
            assert read == set(range(len(held)))
            assert set(held) <= set(local[hop.source])
            assert hop.source != rank
            deliveries += len(held)
        assert sent[rank] == schedule.key_tokens_sent(rank)
        assert len(schedule.hops(rank)) == layout.size, "home, and R-1 hops"
    # Each reader gets each piece once: no schedule can send less.
    readers = sum(len(run) * len(who - {rank}) for rank in range(layout.size) for run, _, who in schedule.readers(rank))
    assert sum(sent.values()) == deliveries == readers


@settings(max_examples=150, deadline=None, derandomize=True)
@given(placement=placements())
def test_gradients_of_every_reader_come_home_once_and_the_own_share_never_leaves(placement):
    layout, mask = placement
    schedule, local = schedule_of(layout, mask), positions(layout)
    history, _ = play(schedule, local)
    size = layout.size
    # A gradient is the multiset of ranks that added a share to it.
    home = [[Counter([rank]) for _ in local[rank]] for rank in range(size)]
    travelling: dict[int, list[Counter]] = {}
    sent: Counter = Counter()
    for distance in range(1, size):
        shares = {}
        for rank in range(size):
            shares[rank] = [Counter([rank]) for _ in history[rank][distance]]
            if distance > 1:
                places = picked(list(range(len(shares[rank]))), schedule.hops(rank)[distance - 1].passed)
                for place, gradient in zip(places, travelling.pop(rank, []), strict=True):
                    shares[rank][place] += gradient
        assert not travelling
        for rank in range(size):
            hop = schedule.hops(rank)[distance]
            on, done = picked(shares[rank], hop.on), picked(shares[rank], hop.done)
            assert len(on) + len(done) == hop.tokens
            sent[rank] += len(on) + len(done)
            if on:
                travelling[schedule.next(rank)] = on
            owner = schedule.hops(hop.source)[distance]
            assert (owner.visitor, hop.source == rank) == (rank, False) or not hop.tokens
            for place, gradient in zip(picked(list(range(len(home[hop.source]))), owner.returned), done, strict=True):
                home[hop.source][place] += gradient
    assert not travelling
    for rank in range(size):
        assert sent[rank] == schedule.gradient_tokens_sent(rank)
        expected = [who | {rank} for run, _, who in schedule.readers(rank) for _ in run]
        assert home[rank] == [Counter(who) for who in expected]


@pytest.mark.parametrize("size", range(2, 17))
def test_causal_zigzag_sends_exactly_three_quarters_of_the_plain_ring(size):
    length = 2 * size * 3
    plain = (size - 1) * length
    for mask, layout, share in [
        (CAUSAL, "zigzag", 0.75),
        (CAUSAL, "contiguous", 0.5),
        (FULL, "zigzag", 1.0),
        (FULL, "contiguous", 1.0),
        (CAUSAL, "striped", 1.0),
    ]:
        schedule = schedule_of(Layout(layout, length, size), mask)
        keys = [schedule.key_tokens_sent(rank) for rank in range(size)]
        gradients = [schedule.gradient_tokens_sent(rank) for rank in range(size)]
        assert sum(keys) == sum(gradients) == share * plain, (layout, mask)


@pytest.mark.parametrize("size", [2, 4, 7, 16])
def test_bytes_of_the_method_at_the_formulas_of_the_papers(size):
    """2(R-1) g X forward for a full mask, 0.75 of it for causal zigzag; backward that and 2(R-1) g (X/e) 4 for dkv."""
    batch, heads, kv_heads, dim = 3, 6, 2, 8
    length = 2 * size * 3
    for element_size, layout, mask, share in [
        (2, "zigzag", CAUSAL, 0.75),
        (4, "zigzag", FULL, 1.0),
        (2, "contiguous", CAUSAL, 0.5),
    ]:
        ring = 2 * (size - 1) * batch * (length // size) * kv_heads * dim
        workload = Workload(size, heads, kv_heads, length, batch, dim, None, element_size, layout, mask)
        sent = [METHODS["ring"].wire_bytes(workload, rank) for rank in range(size)]
        assert sum(b.forward for b in sent) / size == share * ring * element_size
        assert sum(b.backward for b in sent) / size == share * ring * (element_size + 4)
        narrow = Workload(**{**vars(workload), "ring_gradient_dtype": "input"})
        sent = [METHODS["ring"].wire_bytes(narrow, rank) for rank in range(size)]
        assert sum(b.backward for b in sent) / size == share * ring * 2 * element_size


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_the_ring_goes_the_way_on_which_everything_goes_to_the_neighbour(size):
    for layout, mask, shift in [("zigzag", CAUSAL, -1), ("contiguous", CAUSAL, 1), ("contiguous", FULL, -1)]:
        schedule = schedule_of(Layout(layout, 6 * size, size), mask)
        assert schedule.shift == shift or size == 2
        assert not any(hop.jumps or hop.jumped for rank in range(size) for hop in schedule.hops(rank))


def test_a_window_on_both_sides_sends_keys_to_both_neighbours_and_no_further():
    size = 8
    schedule = schedule_of(Layout("contiguous", 10 * size, size), MaskSpec(window=(5, 5)))
    for rank in range(size):
        neighbours = {rank - 1, rank + 1} & set(range(size))
        assert [who - {rank} for _, _, who in schedule.readers(rank)] == [neighbours]
    assert sum(schedule.key_tokens_sent(rank) for rank in range(size)) == 10 * 2 * (size - 1)


def test_documents_inside_one_rank_send_nothing_in_contiguous_order():
    schedule = schedule_of(Layout("contiguous", 40, 4), MaskSpec(causal=True, cu_seqlens=(0, 3, 10, 20, 30, 40)))
    for rank in range(4):
        assert schedule.key_tokens_sent(rank) == 0
        assert all(hop.tokens == 0 and not hop.work for hop in schedule.hops(rank)[1:])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=9),
    size=st.integers(1, 9),
)
def test_zigzag_by_document_balances_tokens_and_causal_work(lengths, size):
    borders = (0, *accumulate(lengths))
    layout = Layout("zigzag", borders[-1], size, documents=borders)
    assert max(layout.sizes) - min(layout.sizes) <= 1
    assert sorted(position for rank in positions(layout) for position in rank) == list(range(borders[-1]))
    schedule = schedule_of(layout, MaskSpec(causal=True, cu_seqlens=borders))
    pairs: Counter = Counter()
    for rank in range(size):
        for hop in schedule.hops(rank):
            for work in hop.work:
                document = max(index for index, border in enumerate(borders[:-1]) if border <= work.q_positions[0])
                pairs[rank, document] += sum(sum(k <= q for k in work.k_positions) for q in work.q_positions)
    for document, length in enumerate(lengths):
        found = [pairs[rank, document] for rank in range(size)]
        assert sum(found) == length * (length + 1) // 2 or borders[document] == borders[document + 1]
        assert max(found) - min(found) < 2 * length or length == 0


def test_one_document_by_itself_is_plain_zigzag():
    for length in (0, 5, 16, 37):
        plain, by_document = Layout("zigzag", length, 4), Layout("zigzag", length, 4, documents=(0, length))
        assert positions(plain) == positions(by_document)


def test_bytes_of_documents_are_what_each_would_send_alone():
    borders, size = (0, 24, 24, 72, 120), 4
    mask = MaskSpec(causal=True, cu_seqlens=borders)
    together = schedule_of(Layout("zigzag", 120, size, documents=borders), mask)
    alone = [schedule_of(Layout("zigzag", b - a, size), CAUSAL) for a, b in pairwise(borders)]
    for rank in range(size):
        assert together.key_tokens_sent(rank) == sum(schedule.key_tokens_sent(rank) for schedule in alone)


def test_places_of_a_two_level_ring_hold_maximal_runs():
    layout = Layout("zigzag", 48, 4)
    runs, places = gathered_tokens(layout, (0, 1))
    assert runs == (range(0, 12), range(36, 48))
    assert places == ((range(0, 6), range(18, 24)), (range(6, 12), range(12, 18)))
    assert gathered_tokens(layout, (2, 3))[0] == (range(12, 36),)


def test_the_schedule_of_hundreds_of_documents_costs_as_much_for_each_as_that_of_tens():
    size = 8

    def schedule(documents):
        borders = (0, *accumulate(50 + 37 * index % 1950 for index in range(documents)))
        mask = MaskSpec(causal=True, cu_seqlens=borders)
        hops = schedule_of(Layout("zigzag", borders[-1], size, documents=borders), mask).hops(3)
        # Per document: 3 blocks at home, 2 for each other rank.
        assert sum(len(hop.work) for hop in hops) == documents * (2 * size + 1)

    schedule(2)  # what the first use of a module costs is not counted
    few, many = _lines(lambda: schedule(40)), _lines(lambda: schedule(400))
    assert few > 40
    assert many < 11 * few, (few, many)


@pytest.mark.parametrize(
    ("kind", "documents", "words"),
    [
        ("contiguous", (0, 4, 8), "only zigzag cuts every document by itself, and the layout is contiguous"),
        ("striped", (0, 8), "Choose layout zigzag"),
        ("zigzag", (0, 4, 7), "end at the sequence length, 8"),
        ("zigzag", (0, 5, 4, 8), "never decrease"),
        ("zigzag", (), "start at 0"),
        ("zigzag", (1, 8), "start at 0"),
    ],
)
def test_documents_that_do_not_fit_a_layout_are_refused(kind, documents, words):
    with pytest.raises(SequenceParallelConfigError, match=words) as refused:
        Layout(kind, 8, 2, documents=documents)
    assert f"documents={documents}" in str(refused.value)
