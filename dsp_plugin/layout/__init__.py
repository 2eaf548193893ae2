"""Which rank holds which tokens, and in what order."""

from dsp_plugin.layout.placement import LAYOUTS, MOST_RANKS, Layout, LayoutKind, run_of
from dsp_plugin.layout.runs import Runs, shard_ranges, shard_sizes

__all__ = ["LAYOUTS", "MOST_RANKS", "Layout", "LayoutKind", "Runs", "run_of", "shard_ranges", "shard_sizes"]
