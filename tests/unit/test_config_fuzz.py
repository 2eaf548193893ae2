"""Odd sections, flag sets and calls: each is what an oracle of its own calls legal, or refused in our own words."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from keyword import iskeyword
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_values import BORDERS, NUMBERS, SOME, VALUES, borders_fit, whole

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.launch.__main__ import Command

# What each setting may be, written down once more.
METHODS = {
    "dsp": ("contiguous",),
    "ulysses": ("contiguous", "zigzag", "striped"),
    "ring": ("contiguous", "zigzag", "striped"),
    "usp": ("contiguous", "zigzag", "striped"),
    "lightseq": ("contiguous",),
    "lasp": ("contiguous", "zigzag"),
}
AXES = {"dsp": "u", "ulysses": "u", "ring": "r", "usp": "ur", "lightseq": "r"}
KERNELS = ("auto", "fa3", "fa2", "cuda_flash", "triton", "cpu_flash", "math", "reference")


def text(value: Any) -> bool:
    return type(value) is str and value.isprintable() and value.strip() == value != ""


def identifier(value: Any) -> bool:
    return type(value) is str and value.isidentifier() and not iskeyword(value)


def argument(value: Any) -> bool:
    if type(value) is not str:
        return False
    name, *places = value.split(".")
    return identifier(name) and all(place.isascii() and place.isdigit() for place in places)


def reference(value: Any) -> bool:
    if type(value) is not str or value.count(":") != 1:
        return False
    return all(identifier(name) for side in value.split(":") for name in side.split("."))


def dim(value: Any) -> bool:
    return whole(value, -64, 63)


def amount(value: Any) -> bool:
    return value in ("2GiB", "40GB", "1.5 MiB")


MEMORY: dict[str, Callable[[Any], bool]] = {
    "tile_tokens": lambda v: v is None or whole(v, 1, 2**63 - 1),
    "mlp_tiles": lambda v: whole(v, 1, 2**63 - 1),
    "offload": lambda v: type(v) is bool or amount(v),
    "attention_rounds": lambda v: whole(v, 1, 2**63 - 1) or amount(v),
}
AMOUNTS = st.sampled_from(["2GiB", "40GB", "1.5 MiB", "GiB", "-1GB", "0B", "2 gibibytes", "1e400GB", "nanGB"])
PARTS = st.dictionaries(st.sampled_from([*MEMORY, "offloads", 3]), st.one_of(VALUES, AMOUNTS), max_size=2)


def memory_fits(memory: Any, described: bool, rounds: bool) -> bool:
    """Args: described: by a plan or a batch. rounds: whether the method gathers tokens."""
    if type(memory) is str:
        return memory == "auto"
    return (rounds or memory.get("attention_rounds", 1) == 1) and (
        not described or (memory.get("tile_tokens") is None and memory.get("mlp_tiles", 1) == 1)
    )


LEGAL: dict[str, Callable[[Any], bool]] = {
    "method": lambda v: type(v) is str and v in METHODS,
    **dict.fromkeys(("size", "ulysses_size", "ring_size", "heads"), lambda v: v is None or whole(v, 1, 2**20)),
    "layout": lambda v: type(v) is str and v in ("auto", "contiguous", "zigzag", "striped"),
    "kernel": lambda v: type(v) is str and v in KERNELS,
    "debug": lambda v: type(v) is bool,
    "quiet": lambda v: type(v) is bool,
    "recompute": lambda v: type(v) is str and v in ("full", "keep_attention"),
    "ulysses_order": lambda v: type(v) is str and v in ("adjacent", "strided"),
    "ring_gradient_dtype": lambda v: type(v) is str and v in ("fp32", "input"),
    "exchange": lambda v: type(v) is str and v in ("auto", "ring", "allgather", "scan"),
    "softmax_method": lambda v: type(v) is str and v in ("ulysses", "ring", "usp", "lightseq"),
    "log_every": lambda v: whole(v, 0, 2**63 - 1),
    "log_tensorboard": lambda v: v is None or text(v),
    "log_wandb": lambda v: v is None or text(v),
    "peak_tflops": lambda v: v is None or (type(v) in (int, float) and 0 < v < 1.7e308),
    "plan": lambda v: v is None or reference(v),
    "attention": lambda v: type(v) in (list, tuple) and all(map(text, v)),
    "batch": lambda v: type(v) is dict and all(argument(name) and dim(at) for name, at in v.items()),
    "positions": lambda v: v is None or argument(v),
    "loss": lambda v: (
        v is None
        or (
            type(v) is dict
            and set(v) <= {"labels", "ignore_index"}
            and argument(v.get("labels", "labels"))
            and whole(v.get("ignore_index", -100), 1 - 2**63, 2**63 - 1)
        )
    ),
    "gather_output": lambda v: v is None or dim(v),
    "memory": lambda v: (
        (type(v) is str and v == "auto")
        or (type(v) is dict and all(key in MEMORY and MEMORY[key](value) for key, value in v.items()))
    ),
}


def sizes_fit(section: dict[str, Any], method: str) -> bool:
    size, ulysses, ring = (section.get(key) for key in ("size", "ulysses_size", "ring_size"))
    if size is None and ulysses is None and ring is None:
        return False
    axes = AXES[method]
    if ("u" not in axes and ulysses not in (None, 1)) or ("r" not in axes and ring not in (None, 1)):
        return False
    if size is None:
        return (ulysses or 1) * (ring or 1) <= 2**20
    if axes == "u":
        return ulysses in (None, size)
    if axes == "r":
        return ring in (None, size)
    if ulysses is not None and ring is not None:
        return ulysses * ring == size
    return size % (ulysses or ring or 1) == 0


def legal(section: dict[str, Any]) -> bool:
    """Whether a section may be accepted: value by value, then what goes together."""
    if not all(key in LEGAL and LEGAL[key](value) for key, value in section.items()) or "method" not in section:
        return False
    method, layout, batch = section["method"], section.get("layout", "auto"), section.get("batch", {})
    softmax = section.get("softmax_method", "lightseq") if method == "lasp" else method
    loss, output, plan = section.get("loss"), section.get("gather_output"), section.get("plan")
    named = bool(section.get("attention", ()))
    return (
        sizes_fit(section, softmax)
        and (method == "lasp" or ("softmax_method" not in section and section.get("exchange", "auto") == "auto"))
        and (layout == "auto" or (layout in METHODS[method] and layout in METHODS[softmax]))
        and (plan is None or (layout in ("auto", "contiguous") and method not in ("lightseq", "lasp") and not batch))
        and (not batch or method != "dsp")
        and bool(batch) == named
        and bool(batch) == (loss is not None or output is not None)
        and (bool(batch) or section.get("positions") is None)
        and (loss is None or loss.get("labels", "labels") in batch)
        and (
            bool(section.get("log_every"))
            or all(section.get(key) is None for key in ("log_tensorboard", "log_wandb", "peak_tflops"))
        )
        and memory_fits(
            section.get("memory", {}),
            described=bool(batch) or plan is not None or method == "dsp",
            rounds=method != "dsp" and "u" in AXES[softmax],
        )
    )


BATCH = {"batch": {"input_ids": 1, "labels": 1}, "attention": ["layers.*.attn"], "loss": {"labels": "labels"}}
BASES: list[dict[str, Any]] = [
    {"method": "dsp", "size": 2},
    {"method": "dsp", "size": 4, "plan": "my.plans:plan"},
    {"method": "ulysses", "size": 4, **BATCH},
    {"method": "ring", "size": 2, "layout": "zigzag", **BATCH, "gather_output": 1},
    {"method": "usp", "ulysses_size": 2, "ring_size": 2, "heads": 8, "memory": {"attention_rounds": 2}},
    {"method": "ulysses", "size": 2, "memory": {"tile_tokens": 64, "mlp_tiles": 2, "offload": "2GiB"}},
    {"method": "usp", "size": 12, "log_every": 10, "peak_tflops": 989.5, "log_tensorboard": "runs/1"},
    {"method": "lightseq", "size": 3, **BATCH, "positions": None},
    {"method": "lasp", "size": 4, "exchange": "scan", "softmax_method": "usp", "ulysses_size": 2},
]


@st.composite
def sections(draw: Any, keys: tuple[Any, ...] = (*LEGAL, "sise", 3)) -> dict[str, Any]:
    """A section that would do, with up to three keys of another value, or gone."""
    section = dict(draw(st.sampled_from(BASES)))
    for key in draw(st.lists(st.sampled_from(keys), max_size=3)):
        if draw(st.integers(0, 5)):
            section[key] = draw(st.one_of(PARTS, VALUES) if key == "memory" else VALUES)
        else:
            section.pop(key, None)
    return section


def kept(config: SequenceParallelConfig, section: dict[str, Any]) -> bool:
    """Whether every value is taken as it was given, and none turned into another."""
    for key, value in section.items():
        found = getattr(config, key)
        if key in ("size", "ulysses_size", "ring_size") and value is None:
            continue
        if key == "loss" and value is not None:
            found = {name: getattr(found, name) for name in value}
        if key == "attention":
            value = tuple(value)
        if key == "memory" and value != "auto":
            found, value = found.model_fields_set, set(value)
        if found != value or (type(found) is not type(value) and key != "peak_tflops"):
            return False
    return config.ulysses_size * config.ring_size == config.size


def judge(read: Callable[[], SequenceParallelConfig | None], section: dict[str, Any]) -> None:
    """It is accepted, as it is, if and only if the oracle says so."""
    try:
        config = read()
    except SequenceParallelConfigError:
        assert not legal(section), f"refused wrongly: {section}"
        return
    assert legal(section), f"accepted wrongly: {section}"
    assert config is not None
    assert kept(config, section), (section, config)


@SOME
@given(sections())
def test_no_odd_section_is_accepted_or_refused_wrongly(section: dict[str, Any]) -> None:
    judge(lambda: SequenceParallelConfig.from_deepspeed({"sequence_parallel": section}), section)


UNFLAGGED = ("heads", "plan", "attention", "batch", "positions", "loss", "gather_output")


@SOME
@given(sections(tuple(key for key in LEGAL if key not in UNFLAGGED)))
def test_no_odd_flags_are_accepted_or_refused_wrongly(section: dict[str, Any]) -> None:
    flags = {key: value for key, value in section.items() if key not in UNFLAGGED and value is not None}
    # Megatron has a size whether it is given or not.
    flags.setdefault("size", 1)
    given_ = Namespace(**{"context_parallel_size" if key == "size" else f"sp_{key}": flags[key] for key in flags})
    if "method" in flags:
        judge(lambda: SequenceParallelConfig.from_megatron(given_), flags)
    elif any(value is not False for key, value in flags.items() if key != "size"):
        with pytest.raises(SequenceParallelConfigError, match="without --sp-method"):
            SequenceParallelConfig.from_megatron(given_)
    else:
        assert SequenceParallelConfig.from_megatron(given_) is None


WORDS = [
    *("--sp-method", "--sp-method=ulysses", "ring", "--sp-ulysses-size", "--sp-ulysses-size=2", "--sp-ring-size=-1"),
    *("2", "0", "x", "1e3", "٣", "--sp-log-every=1.5", "--sp-log-every", "--sp-peak-tflops=nan", "--sp-debug"),
    *("--sp-debug=1", "--sp-quiet", "--sp_method", "--sp-methd=ring", "--sp-", "--", "-", "", "--cpu", "--cpu=force"),
    *("--timeout=1e300", "--timeout", "--timeout=-1", "--timeout=nan", "--timeout=5", "--report", "--report="),
    *("--local_rank=0", "--local-rank", "script.py", "missing.py", "--context-parallel-size", "--tensor\x00", "\ud800"),
]


@SOME
@given(st.lists(st.sampled_from(WORDS), max_size=5), st.booleans())
def test_no_odd_command_line_ends_in_a_strangers_error(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], with_script: bool
) -> None:
    script = tmp_path_factory.getbasetemp() / "script.py"
    script.touch()
    line = [str(script) if word == "script.py" else word for word in words]
    line = [f"{word}{script.parent}/report" if word == "--report=" else word for word in line]
    line = [*line, str(script)] if with_script else line
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(StringIO()):
        patched.chdir(script.parent)
        try:
            command = Command.parse(line)
        except SequenceParallelConfigError:
            return
    assert command.script == str(script)
    assert 0 <= command.timeout <= 30 * 86400
    for name in ("sp_ulysses_size", "sp_ring_size", "sp_log_every"):
        assert getattr(command.flags, name) is None or type(getattr(command.flags, name)) is int


@SOME
@given(
    causal=st.one_of(st.booleans(), VALUES),
    window=st.one_of(st.none(), st.tuples(NUMBERS, NUMBERS), NUMBERS),
    cu_seqlens=st.one_of(st.none(), BORDERS),
)
def test_no_odd_mask_is_accepted_or_refused_wrongly(causal: Any, window: Any, cu_seqlens: Any) -> None:
    fits = (
        type(causal) is bool
        and (
            window is None
            or (
                type(window) in (list, tuple)
                and len(window) == 2
                and all(side is None or whole(side, 0, 2**63 - 1) for side in window)
            )
        )
        and (cu_seqlens is None or borders_fit(cu_seqlens))
    )
    try:
        mask = MaskSpec(causal, window, cu_seqlens)
    except SequenceParallelConfigError:
        assert not fits
        return
    assert fits
    assert mask.window == (None if window is None else tuple(window))
    assert mask.cu_seqlens == (None if cu_seqlens is None else tuple(cu_seqlens))
    length = 6 if mask.cu_seqlens is None else mask.cu_seqlens[-1]
    assert 0 <= mask.pairs(length) <= length**2


@SOME
@given(
    kind=st.one_of(st.sampled_from(["contiguous", "zigzag", "striped"]), VALUES),
    length=NUMBERS,
    size=st.one_of(st.integers(1, 5), NUMBERS),
    sizes=st.one_of(st.none(), st.none(), BORDERS),
    documents=st.one_of(st.none(), st.none(), BORDERS),
)
def test_no_odd_layout_is_accepted_or_refused_wrongly(
    kind: Any, length: Any, size: Any, sizes: Any, documents: Any
) -> None:
    fits = (
        type(kind) is str
        and kind in ("contiguous", "zigzag", "striped")
        and whole(length, 0, 2**63 - 1)
        and whole(size, 1, 2**20)
        and (
            sizes is None
            or (
                kind == "contiguous"
                and type(sizes) in (list, tuple, range)
                and all(whole(part, 0) for part in sizes)
                and (len(sizes), sum(sizes)) == (size, length)
            )
        )
        and (documents is None or (kind == "zigzag" and borders_fit(documents, length)))
    )
    try:
        layout = Layout(kind, length, size, sizes, documents)
    except SequenceParallelConfigError:
        assert not fits
        return
    assert fits
    if size < 10:
        assert sum(layout.sizes) == length
