"""What `dsp-plugin dry-run --device cuda` prints: what the step asks of a GPU, and which lines do."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.console import Console

from dsp_plugin.cli.output import print_table
from dsp_plugin.rehearsal.cuda.recorder import Counts
from dsp_plugin.rehearsal.timeline import Owner

MOST_PLACES = 15
# What is counted by line, and how it is called.
_LISTED = {
    "syncs": "host waits for the device",
    "uploads": "copies from the host",
    "made": "tensors made from Python's numbers",
    "mixed": "CPU tensors beside CUDA ones",
    "faults": "buffers used while they are on their way",
}


def device_report(passes: tuple[Counts, Counts]) -> dict[str, Any]:
    """By pass, as JSON has it."""
    return {name: _told(counts) for name, counts in zip(("forward", "backward"), passes, strict=True)}


def _told(counts: Counts) -> dict[str, Any]:
    return {
        "launches": counts.launches,
        "attention_calls": counts.attention,
        "bytes_read_and_written": counts.traffic,
        "collectives": counts.collectives,
        "launches_by_module": [{"module": at[0], "phase": at[1], "launches": n} for at, n in _places(counts)],
        **{name: dict(Counter(getattr(counts, name)).most_common()) for name in _LISTED},
    }


def show_device(console: Console, passes: tuple[Counts, Counts]) -> None:
    """As tables."""
    rows = [
        ["operators launched, attention left out", *(f"{counts.launches:,}" for counts in passes)],
        ["calls of attention kernels", *(f"{counts.attention:,}" for counts in passes)],
        ["bytes that operators read and write", *(f"{counts.traffic:,}" for counts in passes)],
        ["collectives, sends and receives", *(f"{counts.collectives:,}" for counts in passes)],
        *([said, *(f"{len(getattr(counts, name)):,}" for counts in passes)] for name, said in _LISTED.items()),
    ]
    print_table(console, "Asked of a GPU", ["", "forward", "backward"], rows)
    launched = sum(counts.places.total() for counts in passes)
    places = sorted((each for counts in passes for each in _places(counts)), key=lambda each: -each[1])[:MOST_PLACES]
    print_table(
        console,
        f"Who launches, the {MOST_PLACES} that launch the most",
        ["module", "phase", "launches", "share"],
        [[module, phase, f"{n:,}", f"{n / max(launched, 1):.1%}"] for (module, phase), n in places],
    )
    lines = Counter(
        (said, line) for counts in passes for name, said in _LISTED.items() for line in getattr(counts, name)
    )
    if lines:
        found = [[said, line, str(n)] for (said, line), n in lines.most_common()]
        print_table(console, "Lines that do", ["what", "line", "times"], found)


def _places(counts: Counts) -> list[tuple[tuple[str, str], int]]:
    """Launches by module, layers of a list as one, and phase."""
    found: Counter[tuple[str, str]] = Counter()
    for owner, launches in counts.places.items():
        assert isinstance(owner, Owner)
        found[re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", owner.module), owner.phase] += launches
    return found.most_common()
