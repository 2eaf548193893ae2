"""What scripts do with a sharded model beside training it, in a world of 2 that shares one sequence."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hf_features import start
from hf_models import VOCABULARY, build_model, micro_batch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from dsp_plugin import SequenceParallelConfigError
from dsp_plugin.training.same_sample import CHECKED_FORWARDS

DECAY, NEW_TOKENS = 0.9, 4


def batch(step: int) -> dict[str, Any]:
    """Of the step."""
    return micro_batch("tokens", step, 0, 0)


def used(model: Any, folder: Path | None) -> dict[str, Any]:
    """What one process gets of a model, whose weights it holds, with no help of others."""
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.01)
    averaged.update_parameters(copied)
    averaged.update_parameters(copied)
    tokens, labels = batch(0)["input_ids"], batch(0)["labels"]
    logits = copied(input_ids=tokens).logits
    if folder is not None:
        model.save_pretrained(folder)
    return {
        "copied": [copied(**batch(0)).loss.item(), deepcopy(copied)(**batch(0)).loss.item()],
        "copied_logits": logits[:, -1].tolist(),
        "averaged": averaged(**batch(0)).loss.item(),
        "keys": sorted(model.state_dict()),
        "generated": generated(model),
        "backbone": model.model(input_ids=tokens).last_hidden_state[:, -1].tolist(),
        "own_loss": model.loss_function(logits, labels, vocab_size=VOCABULARY).item(),
        "another": type(model)(model.config).config._attn_implementation,
        "config": model.config.to_json_string(),
    }


def generated(model: Any) -> list[list[int]]:
    """Greedily, with a cache, without one, and by beams."""
    model.eval()
    tokens = batch(0)["input_ids"]
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    found = [
        model.generate(tokens, **asked),
        model.generate(tokens, use_cache=False, **asked),
        model.generate(tokens, num_beams=2, **asked),
    ]
    model.train()
    return [sequence.tolist() for sequence in torch.cat(found)]


def living(folder: Path) -> dict[str, Any]:
    """A step, then what the first rank does alone, then another step."""
    torch.manual_seed(0)
    engine = start(build_model("llama"), zero=1)
    first = step(engine, 0)
    found = used(engine.module, folder / "saved") if dist.get_rank() == 0 else {}
    return {"losses": [first, step(engine, 1)], **found}


def step(engine: Any, number: int) -> float:
    """One step of training."""
    loss = engine(**batch(number)).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def gathered_by_layer() -> dict[str, Any]:
    """Under ZeRO 3 all ranks together generate, call the backbone, and get no copy."""
    torch.manual_seed(0)
    engine = start(build_model("llama"), "ulysses", zero=3)
    first = step(engine, 0)
    try:
        deepcopy(engine.module)
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    return {
        "generated": generated(engine.module),
        "backbone": engine.module.model(input_ids=batch(0)["input_ids"]).last_hidden_state[:, -1].tolist(),
        "losses": [first, step(engine, 1)],
        "refused": refused,
    }


def backbone_learns() -> dict[str, Any]:
    """A script's own head on what the backbone returns, with layers recomputed: gradients of all ranks alike."""
    found = {}
    for checkpointing in ("plain", "reentrant"):
        torch.manual_seed(0)
        model = build_model("llama", checkpointing)
        start(model)
        headed(model).backward()
        found[checkpointing] = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    return found


def headed(model: Any) -> Tensor:
    """A loss of the last token's hidden states."""
    model.enable_input_require_grads()
    return model.model(input_ids=batch(0)["input_ids"]).last_hidden_state[:, -1].square().mean()


def distilled(student: Any, teacher: Any, critic: Any, number: int) -> Tensor:
    """A loss of three models, by whole logits."""
    tokens = batch(number)["input_ids"]
    with torch.no_grad():
        target = teacher(input_ids=tokens).logits.softmax(-1)
        weight = critic(input_ids=tokens).logits.mean(-1, keepdim=True).sigmoid()
    return -(weight * target * F.log_softmax(student(input_ids=tokens).logits, -1)).sum(-1).mean()


def three_models() -> list[Any]:
    """Of one config object: student, teacher and critic."""
    torch.manual_seed(0)
    student = build_model("qwen3")
    teacher = deepcopy(student).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    critic = type(student)(student.config).eval()
    return [student, teacher, critic]


def company() -> dict[str, Any]:
    """A student and its teacher are sharded by unlike methods, a critic is not."""
    student, teacher, critic = three_models()
    engine, fixed = start(student, "usp", zero=2), start(teacher, "ring")
    fixed.eval()
    losses = []
    for number in range(3):
        loss = distilled(engine, fixed, critic, number)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"losses": losses}


def attention_changed_later() -> dict[str, Any]:
    """A script that chooses an attention implementation after `deepspeed.initialize` chooses that of other times."""
    torch.manual_seed(0)
    engine = start(build_model("llama"))
    engine.module.set_attn_implementation("sdpa")
    loss = engine(**batch(0)).loss.item()
    return {"loss": loss, "implementation": engine.module.config._attn_implementation}


def trained_on_its_own() -> dict[str, Any]:
    """Peers learn from what each generated for itself, after the first passes, and one got another token."""
    torch.manual_seed(0)
    engine = start(build_model("llama"))
    for step in range(CHECKED_FORWARDS + 1):
        engine(**batch(step))
    tokens = engine.module.generate(batch(0)["input_ids"], max_new_tokens=NEW_TOKENS, do_sample=False)
    engine(input_ids=tokens, labels=tokens)
    tokens = tokens.clone()
    tokens[0, -1] = (tokens[0, -1] + dist.get_rank()) % VOCABULARY
    try:
        engine(input_ids=tokens, labels=tokens)
    except SequenceParallelConfigError as error:
        return {"refused": str(error)}
    return {"refused": None}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name."""
    return {
        "living": partial(living, folder),
        "living-zero3": gathered_by_layer,
        "backbone": backbone_learns,
        "company": company,
        "trained_on_its_own": trained_on_its_own,
        "attention_changed_later": attention_changed_later,
    }
