"""Shapes of models from what describes them: counts of parameters as the libraries build them."""

import json
from pathlib import Path

import pytest

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.planner.model_files import from_megatron, from_transformers, shapes_of, shipped
from dsp_plugin.planner.shapes import Shapes

ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 128}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"head_dim": 32, "tie_word_embeddings": False}),
        ("Mistral", {"sliding_window": 8, "tie_word_embeddings": False}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
        ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_inner": None, "n_positions": 32}),
    ],
)
def test_parameters_are_those_of_transformers_model(name, changes):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    given = changes if name == "GPT2" else {**SMALL, **changes}
    config = getattr(transformers, f"{name}Config")(**given, **({"vocab_size": 128} if name == "GPT2" else {}))
    with torch.device("meta"):
        kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
        model = getattr(transformers, kind)(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    # Biases and learned positions are not counted.
    others = sum(
        parameter.numel() for found, parameter in model.named_parameters() if found.endswith("bias") or ".wpe." in found
    )
    assert from_transformers(config.to_dict()).parameters == count - others
    assert from_transformers(json.loads(config.to_json_string(use_diff=True))).parameters == count - others


def test_windows_are_those_of_the_layers_that_have_them():
    of_layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
    assert from_transformers({**SMALL, **of_layers}).kinds() == {7: 2, None: 1}
    assert from_transformers({**SMALL, "sliding_window": 8}).kinds() == {7: 3}
    assert from_transformers({**SMALL, "sliding_window": 8, "use_sliding_window": False}).kinds() == {None: 3}


def test_megatrons_arguments():
    found = shapes_of(str(ROOT / "configs/megatron/gpt_7b.args"))
    assert found == Shapes(32, 4096, 32, 8, 128, 14336, 128000, positions=131072)
    plain = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads=4", "--vocab-size", "100"]
    assert from_megatron(plain) == Shapes(2, 64, 4, 4, 16, 256, 100, tied=True, gated=False)


def test_a_folder_and_a_file_are_read_alike(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "tie_word_embeddings": False}))
    assert shapes_of(str(tmp_path)) == shapes_of(str(tmp_path / "config.json"))


def test_known_models_are_as_large_as_their_names_say():
    billions = {name: found.parameters / 1e9 for name, found in ((name, shapes_of(name)) for name in shipped())}
    assert {name: round(count, 1) for name, count in billions.items()} == {
        "llama-8b": 8.0,
        "llama-70b": 70.6,
        "qwen3-8b": 8.2,
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 64}, "num_attention_heads"),
        ({**SMALL, "num_key_value_heads": 3}, "4 query heads do not divide into 3 groups"),
        ({**SMALL, "vocab_size": "many"}, "vocabulary='many'"),
    ],
)
def test_what_lacks_or_contradicts_itself_is_refused(config, words):
    with pytest.raises(SequenceParallelConfigError, match=words):
        from_transformers(config)


@pytest.mark.parametrize(
    "config",
    [{**SMALL, "layer_types": ["linear_attention"] * 3}, {**SMALL, "kv_lora_rank": 8}, {"is_encoder_decoder": 1}],
)
def test_other_layers_are_refused(config):
    with pytest.raises(UnsupportedError, match="softmax attention and an MLP"):
        from_transformers(config)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(SequenceParallelConfigError, match="no file can be read"):
        shapes_of("llama-9b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SequenceParallelConfigError, match="not JSON"):
        shapes_of(str(tmp_path))
