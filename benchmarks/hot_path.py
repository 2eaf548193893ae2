"""What one attention asks of a GPU besides attention, counted without one: ours beside yunchang and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from benchmarks import plots
from benchmarks.hot_path_calls import Call, Contender, Cost, cost
from benchmarks.result import Result
from dsp_plugin.rehearsal.cuda.process import CudaProcess

NAME = "hot_path"
SIZES = (2, 4, 8, 16)
CONTENDERS: tuple[Contender, ...] = get_args(Contender)
_COLUMNS = ("launches", "attention", "traffic", "moves")


def calls(quick: bool) -> dict[str, Call]:
    """By the name of their rows."""
    found: dict[str, Call] = {}
    for size in SIZES[:2] if quick else SIZES:
        found |= {
            f"ulysses, P={size}": Call("ulysses", size),
            f"ulysses zigzag, P={size}": Call("ulysses", size, "zigzag"),
            f"ring zigzag, P={size}": Call("ring", size, "zigzag"),
            f"usp 2 x {size // 2} zigzag, P={size}": Call("usp", size, "zigzag"),
            f"dsp switch, P={size}": Call("dsp", size),
        }
    # Keys and values of as many heads as ranks, at least, where a peer cannot do with fewer.
    found = {
        name: replace(call, kv_heads=16) if call.method == "ulysses" and call.size == 16 else call
        for name, call in found.items()
    }
    found["ulysses, 28 and 4 heads, P=8"] = Call("ulysses", 8, heads=28, kv_heads=4)
    found["ulysses, 28 and 28 heads, P=8"] = Call("ulysses", 8, heads=28, kv_heads=28)
    found["ulysses, 4,099 tokens, P=8"] = Call("ulysses", 8, tokens=4099)
    found["ring zigzag, 4,099 tokens, P=8"] = Call("ring", 8, "zigzag", tokens=4099)
    if not quick:
        found["ring, 128 documents in 32K tokens, P=8"] = Call("ring", 8, tokens=32768, documents=128)
        found["ring zigzag, the same"] = Call("ring", 8, "zigzag", tokens=32768, documents=128)
    return found


def steps(quick: bool) -> int:
    """How often `run` reports progress."""
    return len(calls(quick))


def run(quick: bool, advance: Callable[[str], None]) -> Result:
    """Count every call of every contender."""
    result = Result(
        NAME,
        "The hot path: what one attention asks of a GPU besides attention",
        {"call": "causal, bf16, 4,096 tokens, 32 query and 8 key/value heads of 64 unless said; rank P/2 - 1"},
        {
            "call": "call",
            "contender": "whose",
            "launches": "launches fwd / bwd",
            "attention": "attention calls",
            "traffic": "traffic in X",
            "moves": "collectives, sends and receives",
            "note": "",
        },
        ["call", "contender", *_COLUMNS],
    )
    result.notes += [
        "Counted on fake CUDA tensors, of a second pass: operators dispatched that are no view, and what they read and "
        "write, in times of the rank's queries (X). Nothing is timed; a load of the machine changes nothing.",
        "flash-attn is one operator that is not looked into. TorchScript, which may fuse some of yunchang's, is off.",
        "Refused is what a peer's own code raises at; not counted is what we did not ask of it.",
        "Ulysses on 16 ranks has 16 key/value heads. Short packed documents lie whole on a rank in zigzag order.",
        "Collectives of ours and of peers alike: every collective, and every send and receive, once.",
    ]
    # Peers bring a package called flash_attn, which is not to be ours.
    processes = {"ours": CudaProcess(), "theirs": CudaProcess()}
    try:
        for name, call in calls(quick).items():
            advance(name)
            for contender in CONTENDERS:
                process = processes["ours" if contender == "ours" else "theirs"]
                _keep(result, name, contender, process.run(cost, contender, call, timeout=600.0))
    finally:
        for process in processes.values():
            process.stop()
    return result


def _keep(result: Result, name: str, contender: Contender, found: Cost | str) -> None:
    row = {"call": name, "contender": contender}
    if isinstance(found, str):
        if contender == "ours":
            result.failures.append(f"{name}: {found}")
        result.rows.append({**row, "note": found})
        return
    both = {key: " / ".join(map(str, value)) for key, value in asdict(found).items()}
    result.rows.append({**row, **both, "note": ""})


def draw(result: Result, path: Path) -> None:
    """Launches of a forward pass, of the calls that all ranks can make."""
    figure, panels = plots.panels(2, "Operators launched around one attention")
    counted = [row for row in result.rows if "launches" in row]
    for panel, index, title in zip(panels, (0, 1), ("forward", "backward"), strict=True):
        names = [f"ulysses, P={size}" for size in SIZES] + [f"ring zigzag, P={size}" for size in SIZES]
        values = {(row["call"], row["contender"]): int(row["launches"].split(" / ")[index]) for row in counted}
        shown = [name for name in names if (name, "ours") in values]
        series = {str(who): [values.get((name, who), 0) for name in shown] for who in CONTENDERS}
        labels = [name.replace(", ", "\n").replace(" zigzag", "") for name in shown]
        plots.bars(panel, labels, series, [plots.color("ulysses"), "0.45", "0.7"])
        panel.set_title(title)
    panels[0].legend(fontsize=8)
    plots.save(figure, path)
