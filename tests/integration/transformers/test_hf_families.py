"""Families of Transformers beside the unsharded model: a covering subset of docs/models.md, and who is taken."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import PAGE, RESULTS, page, read, status_of
from family_world import ALPHA, COVERED, DESCRIBED, SECTION, SIZE, everything
from hf_models import LENGTH, SHAPE
from preloading import preload
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, UnsupportedError
from dsp_plugin.cli.app import app
from dsp_plugin.patches.transformers import check_described, checked_section, tiny, trials, verified
from dsp_plugin.spawn import spawn

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", name="results")
def _results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    preload("transformers.modeling_utils", "dsp_plugin.verification.own_model", "family_world")
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig().save_pretrained(folder)
    return spawn(everything, SIZE, str(folder), timeout=250.0)


@pytest.mark.parametrize("family", COVERED)
def test_a_family_is_exact_or_refused(family: str, results: Results) -> None:
    """Losses of three steps and every gradient, in fp64, of families that differ from Llama in one thing or another."""
    for result in results:
        found = result["families"][family]
        told = {name: f"{verdict.status} {verdict.why} {verdict.first}" for name, verdict in found.items()}
        assert {name: verdict.status for name, verdict in found.items()} == COVERED[family], told


@pytest.mark.parametrize("family", COVERED)
def test_the_page_says_what_is_found(family: str) -> None:
    """Of the installed version, if it was surveyed."""
    for run in read(list(RESULTS.glob(f"transformers-{version('transformers')}-*.json"))):
        listed = run["families"][family]["features"]
        assert {name: listed[name]["status"] for name in COVERED[family]} == COVERED[family]


@pytest.mark.matrix
def test_no_family_is_wrong() -> None:
    """All of them; `make matrix` writes the same to the page."""
    found = families.run({family: tuple(families.FEATURES) for family in families.names()})
    wrong = {family: verdicts for family, verdicts in found.items() if status_of(verdicts) == "wrong"}
    assert not wrong


def test_the_page_is_that_of_the_results() -> None:
    """And has no wrong row."""
    results = read(list(RESULTS.glob("*.json")))
    assert page(results) == PAGE.read_text()
    assert results
    assert not [entry for run in results for entry in run["families"].values() if entry["status"] == "wrong"]


class OwnLlama(LlamaForCausalLM):
    """A script's own class, as remote code has."""


def small_llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    return kind(LlamaConfig(**SHAPE, hidden_size=16, num_attention_heads=2, num_key_value_heads=1))


def test_a_class_of_nobody_knows_where_is_refused_unless_the_section_takes_it() -> None:
    checked_section(small_llama(), SECTION)
    with pytest.raises(
        UnsupportedError, match=r"OwnLlama.*not of Transformers.*verify-model.*\"unverified_model\": true"
    ):
        checked_section(small_llama(OwnLlama), SECTION)
    assert checked_section(small_llama(OwnLlama), {**SECTION, "unverified_model": True}).unverified_model


@pytest.mark.parametrize(
    ("results", "taken"),
    [
        # The installed version has results: they decide, whatever others say.
        ({"now": "exact"}, True),
        ({"now": "refused"}, False),
        ({"now": "wrong", "1.0": "exact"}, False),
        ({"now": None, "1.0": "exact"}, False),
        # It has none.
        ({"1.0": "exact"}, True),
        ({"1.0": "refused", "2.0": "exact"}, True),
        ({"1.0": "wrong", "2.0": "exact"}, False),
        ({"1.0": "not built"}, False),
        ({}, False),
    ],
)
def test_a_family_is_taken_where_the_page_calls_it_exact(
    results: dict[str, str | None], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(release: str, status: str | None) -> dict[str, Any]:
        entries = {"llama": {"class": "LlamaForCausalLM", "status": status}} if status else {}
        return {
            "versions": {"transformers": version("transformers") if release == "now" else release},
            "families": {"other": {"class": "Other", "status": "exact"}, **entries},
        }

    monkeypatch.setattr(verified, "_results", lambda: tuple(run(*item) for item in results.items()))
    assert (verified.unverified(small_llama()) is None) is taken


def test_the_results_are_in_the_package() -> None:
    """Read as the library does, from the installed package."""
    assert [run["families"]["llama"]["status"] for run in verified._results()].count("exact") >= 1
    assert json.dumps(verified._results())


class Around(nn.Module):
    """A script's own wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Shifting(nn.Module):
    """Code of nobody that we know."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.one_hot(input_ids, 9).float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[..., 1:].flatten())


class AsGiven(nn.Module):
    """Whose labels are what follows each token."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.one_hot(input_ids, 9).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class NobodysForCausalLM(AsGiven):
    """By its name, as code that comes with weights has it."""


class Named(NobodysForCausalLM):
    """A script's own of it."""


def test_a_model_that_shifts_its_labels_is_not_given_those_of_a_shard() -> None:
    config = SequenceParallelConfig(
        **{key: value for key, value in DESCRIBED.items() if key not in ("batch", "gather_output")},
        batch={"input_ids": 1, "labels": 1},
        loss={"labels": "labels"},
    )
    with pytest.raises(SequenceParallelConfigError, match=r"LlamaForCausalLM shifts.*\"gather_output\": 1"):
        check_described(small_llama(), config)
    for module in (Around(small_llama()), Shifting(), Named()):
        with pytest.raises(SequenceParallelConfigError, match="shifts its labels itself"):
            check_described(module, config)
    check_described(small_llama(), SequenceParallelConfig(**DESCRIBED))
    for module in (nn.Linear(1, 1), AsGiven()):
        check_described(module, config)


def test_what_a_refusal_tells_to_write_is_exact(results: Results) -> None:
    assert {result["described"].status for result in results} == {"exact"}


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_the_first_module_that_differs_is_named(fault: str, results: Results) -> None:
    """A fault of 1% in the second layer: its MLP by its output, what comes before it in backward by its gradient."""
    expected = {
        "output": "model.layers.1.mlp: output off by 1.0e-02",
        "gradient": "model.layers.1.post_attention_layernorm: gradient of the output off by",
    }
    for result in results:
        verdict = result["located"][fault]
        assert verdict.status == "wrong"
        assert verdict.first.startswith(expected[fault]), verdict.first


def test_noise_has_the_scale_of_the_whole_sequence(results: Results) -> None:
    """NEFTune's: uniform up to alpha / sqrt(L * D). By the length of a shard it would be sqrt(2) times as large."""
    for result in results:
        noise = result["noise"]
        bound = ALPHA / math.sqrt(LENGTH * noise["width"])
        assert noise["largest"] == pytest.approx(bound, rel=2e-3)
        assert noise["deviation"] == pytest.approx(bound / math.sqrt(3), rel=2e-2)
        assert noise["short"] <= ALPHA / math.sqrt(3) * (1 + 1e-6)
        assert noise["silent"] == 0.0
        assert noise["alpha"] == ALPHA
        assert "would hold none of so short a sequence" in noise["refused"]
    assert results[0]["noise"]["first"] != results[1]["noise"]["first"], "the ranks draw the same noise"


def test_a_model_of_the_user_is_exact_or_its_fault_is_named(results: Results) -> None:
    for result in results:
        own = result["own"]
        assert own["folder"].ok
        assert {verdict.status for verdict in own["folder"].verdicts.values()} == {"exact"}
        assert own["folder"].shrunk["hidden_size"] == (4096, tiny.WIDTH)
        assert own["plain"].ok
        assert set(own["plain"].verdicts) == {"as given"}
        assert not own["wrong"].ok
        found = own["wrong"].verdicts["tokens"]
        assert found.status == "wrong"
        assert found.first.startswith("model.rotary_emb: output"), found.first


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def verify_model(*arguments: str) -> Any:
    preload("transformers.modeling_utils", "dsp_plugin.verification.own_model")
    return CliRunner().invoke(app, ["verify-model", *arguments])


@pytest.mark.matrix
def test_code_beside_a_config_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "own.py").write_text(REMOTE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = {**LlamaConfig().to_dict(), "model_type": "own", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    refused = verify_model(str(folder))
    assert refused.exit_code == 2
    assert "--trust-remote-code" in refused.stderr
    done = verify_model(str(folder), "--trust-remote-code", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["class"] == "OwnForCausalLM"
    assert answer["shrunk"]["hidden_size"] == ["4096", str(tiny.WIDTH)]
    assert {name: found["status"] for name, found in answer["verdicts"].items()} == dict.fromkeys(
        trials.FEATURES, "exact"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "there is no such folder"),
        (("nowhere", "--method", "rign"), "ring"),
        (("nowhere", "--config", "nowhere.json"), "--config"),
        (("family_world:nothing",), "it cannot be imported"),
        (("family_world:SIZE",), "it is a int, not a function"),
    ],
)
def test_what_leads_to_no_model_is_refused(arguments: tuple[str, ...], says: str) -> None:
    done = verify_model(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr
