"""What each contender of `benchmarks.space_time` has to send, from its schedule alone."""

from __future__ import annotations

from benchmarks.space_time_models import Sizes

ELEMENT = 4
"""Bytes of an fp32 number."""


def sent_bytes_by_formula(contender: str, sizes: Sizes, ranks: int) -> int:
    """Bytes that leave a rank in one forward and backward pass; every rank sends the same, since sizes divide.

    With M the bytes of the tokens that layers hand on, P ranks, and depth space-time layers:

    - A switch or an all-to-all sends (P-1)/P of a shard. DSP switches between any two of the 2 depth blocks, and back.
      Ulysses has 4 all-to-alls around the attention of one block in each layer, and as many back.
    - Ring, in one block of each layer, sends its keys and values to all others in each pass, and their gradients back.
    - These three split pixels, which sends nothing, and gather pixels at the end: one all-gather.
    - Megatron gathers tokens before, and scatters them behind, self-attention, cross-attention and MLP: 4 collectives
      of (P-1)/P M in both passes, and a 5th to gather once more what the weight's gradient needs. What is left is the
      condition: its modulations are gathered in every block, and at the end.
    """
    tokens = sizes.batch * sizes.frames * sizes.patches * sizes.width * ELEMENT
    shard = tokens // ranks
    border = (ranks - 1) * sizes.batch * sizes.frames * sizes.patches * sizes.pixels * ELEMENT // ranks
    switch = (ranks - 1) * shard // ranks
    if contender == "dsp":
        return border + 2 * (2 * sizes.depth - 1) * switch
    if contender == "ulysses":
        return border + 8 * sizes.depth * switch
    if contender == "ring":
        return border + 6 * sizes.depth * (ranks - 1) * shard
    assert contender == "tp-sp", contender
    blocks = 2 * sizes.depth
    vector = sizes.batch * sizes.width * ELEMENT * (ranks - 1)
    # Gathered and scattered; the gradient of their input is all-reduced, as is that of the condition tokens.
    modulations = (2 * 6 * blocks + 2 * 2 + 2 * (blocks + 1)) * vector // ranks
    condition = 2 * blocks * (sizes.caption + 1) * vector // ranks
    return 15 * blocks * (ranks - 1) * shard + modulations + condition
