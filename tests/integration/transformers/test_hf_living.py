"""A sharded model is copied, averaged, saved, asked to generate and called in parts as an unsharded one is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_living import batch, distilled, generated, headed, three_models, used
from hf_models import build_model
from safetensors.torch import load_file


def trained(zero: bool = True) -> Any:
    """The model of the script after a step, in this process."""
    torch.manual_seed(0)
    model = build_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [step(model, optimizer, 0)]
    return model, optimizer, losses


def step(model: Any, optimizer: Any, number: int) -> float:
    optimizer.zero_grad()
    loss = model(**batch(number)).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_one_rank_copies_averages_generates_and_saves(hf_world: Callable[..., Any], tmp_path: Path) -> None:
    """The first rank does it alone, so nothing of it waits for others; the step after it is the unsharded one."""
    model, optimizer, losses = trained()
    expected = used(model, tmp_path)
    losses.append(step(model, optimizer, 1))
    first, second = hf_world(2, "living").results("living")
    assert first.pop("losses") == close(losses)
    assert second["losses"] == close(losses)
    for name in ("keys", "generated", "another", "config"):
        assert first[name] == expected[name], name
    for name in ("copied", "averaged", "own_loss"):
        assert first[name] == close(expected[name]), name
    for name in ("copied_logits", "backbone"):
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)
    saved = hf_world(2, "living").folder / "saved"
    assert sorted(path.name for path in saved.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for name in ("config.json", "generation_config.json"):
        assert json.loads((saved / name).read_text()) == json.loads((tmp_path / name).read_text())
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def test_under_zero_3_ranks_generate_together_and_copies_are_refused(hf_world: Callable[..., Any]) -> None:
    model, optimizer, losses = trained()
    tokens = batch(0)["input_ids"]
    expected, backbone = generated(model), model.model(input_ids=tokens).last_hidden_state[:, -1]
    losses.append(step(model, optimizer, 1))
    for result in hf_world(2, "living").results("living-zero3"):
        assert result["generated"] == expected
        torch.testing.assert_close(torch.tensor(result["backbone"]), backbone, rtol=1e-5, atol=1e-6)
        assert result["losses"] == close(losses)
        assert "UnsupportedError: copy.deepcopy of a model under ZeRO 3" in result["refused"]
        assert "before deepspeed.initialize" in result["refused"]


def test_a_head_on_the_backbone_learns_as_alone(hf_world: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = build_model("llama")
    headed(model).backward()
    expected = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    for result in hf_world(2, "living").results("backbone"):
        for found in result.values():
            assert found == close(expected)


def test_models_in_one_process_keep_out_of_each_others_way(hf_world: Callable[..., Any]) -> None:
    """A student and its teacher by unlike methods and an unsharded critic, of which two came from one config."""
    student, teacher, critic = three_models()
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.1), []
    for number in range(3):
        optimizer.zero_grad()
        loss = distilled(student, teacher, critic, number)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for result in hf_world(2, "living").results("company"):
        assert result["losses"] == pytest.approx(losses, rel=1e-6)


def test_what_peers_generated_unlike_is_refused(hf_world: Callable[..., Any]) -> None:
    """Each generates for itself, so every pass from then on is compared, not the first ones only."""
    for result in hf_world(2, "living").results("trained_on_its_own"):
        assert "different samples" in result["refused"]


def test_an_implementation_chosen_later_is_that_outside_of_passes(hf_world: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    expected = build_model("llama")(**batch(0)).loss.item()
    for result in hf_world(2, "living").results("attention_changed_later"):
        assert result["loss"] == pytest.approx(expected, rel=1e-6)
        assert result["implementation"] == "sdpa"
