"""Shapes from what describes a model elsewhere: a config of Transformers, Megatron's arguments, or a short name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.planner.shapes import Experts, Shapes

# Families whose MLP is two matrices, by Transformers' model_type.
_UNGATED = (
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2", "gpt_bigcode"),
    *("codegen", "xglm", "biogpt", "mpt", "nemotron", "persimmon", "stablelm_epoch"),
)
_ATTENTION = ("full_attention", "sliding_attention", "attention")
_ANOTHER = "name the config.json of a causal language model, or a model whose shapes come with the library"


def shipped() -> list[str]:
    """The models whose shapes come with the library."""
    return sorted(entry.name.removesuffix(".json") for entry in _shapes().iterdir() if entry.name.endswith(".json"))


def shapes_of(model: str) -> Shapes:
    """The shapes of what ``model`` names: a short name, a folder or a file.

    Args:
        model: of `shipped`; a config.json of Transformers or its folder; or a file of Megatron's arguments.

    Raises:
        SequenceParallelConfigError: it is none of them, or says too little.
        UnsupportedError: it has layers that are not attention and an MLP.
    """
    if model in shipped():
        return from_transformers(_json((_shapes() / f"{model}.json").read_text(), model), model)
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise SequenceParallelConfigError(
            setting="--model",
            value=model,
            why=f"no short name, and no file can be read there: {getattr(error, 'strerror', None) or error}",
            remedy=f"{_ANOTHER}: {', '.join(shipped())}",
        ) from None
    if text.lstrip().startswith("{"):
        return from_transformers(_json(text, model), str(file))
    return from_megatron(shlex.split(text, comments=True), str(file))


def from_transformers(config: Mapping[str, Any], source: str = "config") -> Shapes:
    """The shapes of a config of Transformers, as a mapping: ``config.to_dict()``, or what config.json holds.

    Raises:
        SequenceParallelConfigError: it lacks one of them.
        UnsupportedError: it has layers that are not attention and an MLP.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {**inner, "tie_word_embeddings": config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))}

    def first(*names: str, default: Any = None) -> Any:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if found is None:
            raise SequenceParallelConfigError(setting=source, why=f"it has none of {', '.join(names)}", remedy=_ANOTHER)
        return found

    _check_layers(config, source)
    kind = str(config.get("model_type", ""))
    hidden = first("hidden_size", "n_embd", "d_model")
    heads = first("num_attention_heads", "n_head", "n_heads")
    tied = config.get("tie_word_embeddings")
    return Shapes(
        layers=first("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=first("num_key_value_heads", "num_kv_heads", default=heads),
        head_dim=first("head_dim", default=hidden // heads),
        intermediate=first("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden),
        vocabulary=first("vocab_size"),
        # What Transformers assumes, and so leaves out where it writes a config.
        tied=True if tied is None else bool(tied),
        gated=kind not in _UNGATED,
        experts=_experts(config),
        windows=_windows(config, first("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
        positions=config.get("max_position_embeddings", config.get("n_positions")),
        source=source,
    )


def from_megatron(argv: Sequence[str], source: str = "arguments") -> Shapes:
    """The shapes that Megatron's arguments name.

    Args:
        argv: as on the command line.

    Raises:
        SequenceParallelConfigError: one that is needed is missing, or is no number.
        UnsupportedError: they ask for layers that are not attention and an MLP.
    """
    for flag in ("--hybrid-override-pattern", "--hybrid-layer-pattern", "--multi-latent-attention"):
        if _given(argv, flag):
            raise UnsupportedError(
                setting=f"{source}: {flag}",
                why="the planner prices layers of softmax attention and an MLP, and these are others",
                remedy="choose the method by docs/configuration.md, and measure it by dsp-plugin dry-run",
            )

    def number(flag: str, default: int | None = None) -> int:
        text = _value(argv, flag)
        if text is None and default is not None:
            return default
        if text is None or not text.isdecimal():
            raise SequenceParallelConfigError(
                setting=f"{source}: {flag}",
                value=text,
                why="missing" if text is None else "not a whole number",
                remedy="name a file of Megatron's arguments that has it",
            )
        return int(text)

    layers, hidden = number("--num-layers"), number("--hidden-size")
    heads, gated = number("--num-attention-heads"), _given(argv, "--swiglu")
    # Megatron's own rule: two thirds of the width, in steps of 64.
    inside = number("--ffn-hidden-size", (8 * hidden // 3) // 64 * 64 if gated else 4 * hidden)
    experts = None
    if _given(argv, "--num-experts"):
        experts = Experts(
            number("--num-experts"),
            number("--moe-router-topk", 2),
            number("--moe-ffn-hidden-size", inside),
            number("--moe-shared-expert-intermediate-size", 0),
        )
    return Shapes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=number("--num-query-groups", 1) if _given(argv, "--group-query-attention") else heads,
        head_dim=number("--kv-channels", hidden // heads),
        intermediate=inside,
        vocabulary=number("--padded-vocab-size", number("--vocab-size", 0)),
        tied=not _given(argv, "--untie-embeddings-and-output-weights"),
        gated=gated,
        experts=experts,
        positions=number("--seq-length", number("--max-position-embeddings", 0)) or None,
        source=source,
    )


def _check_layers(config: Mapping[str, Any], source: str) -> None:
    other = sorted(set(map(str, config.get("layer_types") or ())) - set(_ATTENTION))
    found: tuple[str, object] | None = ("layer_types", other) if other else None
    if config.get("kv_lora_rank"):
        found = ("kv_lora_rank", config["kv_lora_rank"])
    if config.get("is_encoder_decoder"):
        found = ("is_encoder_decoder", True)
    if found is not None:
        raise UnsupportedError(
            setting=f"{source}: {found[0]}",
            value=found[1],
            why="the planner prices layers of softmax attention and an MLP, and these are others",
            remedy="choose the method by docs/configuration.md, and measure it by dsp-plugin dry-run",
        )


def _experts(config: Mapping[str, Any]) -> Experts | None:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    count = next((config[name] for name in names if config.get(name)), None)
    if count is None:
        return None
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    shared = config.get("shared_expert_intermediate_size") or 0
    shared = shared or (config.get("n_shared_experts") or 0) * (width or 0)
    dense = config.get("first_k_dense_replace") or len(config.get("mlp_only_layers") or ())
    chosen = next((config[name] for name in ("num_experts_per_tok", "moe_topk", "moe_k") if config.get(name)), 2)
    return Experts(count, chosen, width or 0, shared, dense)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Transformers' windows count the token itself."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or window < 1 or config.get("use_sliding_window") is False:
        return ()
    kinds = config.get("layer_types")
    count = layers if kinds is None else sum(kind == "sliding_attention" for kind in kinds)
    return (window - 1,) * count


def _json(text: str, model: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SequenceParallelConfigError(
            setting="--model", value=model, why=f"it is not JSON: {error}", remedy=_ANOTHER
        ) from None
    return found if isinstance(found, Mapping) else {}


def _shapes() -> Any:
    return files("dsp_plugin.configs") / "shapes"


def _given(argv: Sequence[str], flag: str) -> bool:
    return any(argument.partition("=")[0] == flag for argument in argv)


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The last value that a flag is given."""
    found = None
    for at, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else next(iter(argv[at + 1 : at + 2]), None)
    return found
