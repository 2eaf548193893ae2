"""All runs of `grid_cases`."""

from functools import partial

from grid_cases import runs as all_runs

runs = partial(all_runs, everything=True)
