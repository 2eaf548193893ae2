"""What DSP's formula says that a rank of a Megatron model of two dims sends in switches, and what it did send."""

from __future__ import annotations

import json
from pathlib import Path

from dsp_plugin.methods.dsp import switch_bytes

ELEMENT = 4


def assert_switches(
    folder: Path, shape: tuple[int, ...], *, first: int, layers: int, times: int, cp: int, tp: int = 1, pp: int = 1
) -> None:
    """Compares ``sent-R.json`` of all ranks, which are tp x cp x pp, tp innermost.

    Args:
        shape: of the whole activation of one rank's part of the tokens; dims 0 and 1 are switched.
        first: the dim that the first block of a layer runs with sharded; the second has the other.
        layers: of the whole model, a block along either dim in each.
        times: micro-batches of the whole run.
    """
    for rank in range(tp * cp * pp):
        cp_rank, stage = rank // tp % cp, rank * pp // (tp * cp * pp)
        inside, back = (
            switch_bytes(shape, source, 1 - source, size=cp, rank=cp_rank, element_size=ELEMENT)
            for source in (first, 1 - first)
        )
        here = layers // pp
        # The first block of all cuts its tokens out of what is whole; the last one leaves them where they are.
        returns = here - (stage == 0)
        expected = {
            "forward": times * (here * inside.forward + returns * back.forward),
            "backward": times * (here * inside.backward + returns * back.backward),
            "other": 0,
        }
        assert expected["forward"] > 0
        assert json.loads((folder / f"sent-{rank}.json").read_text()) == expected, rank
