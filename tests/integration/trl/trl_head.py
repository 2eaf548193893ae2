"""The fused head called by a script: everything that it returns, and gradients, against an unsharded copy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

EVERYTHING = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS, LENGTH = 2, 19


def differences(model_folder: Path, section: dict[str, Any]) -> dict[str, float]:
    """The largest of each field, for labels as Transformers has them and for shifted ones."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    alone = copy.deepcopy(model)
    for each in (model, alone):
        add_fused_lm_head(each, temperature=0.7, outputs=EVERYTHING)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 1e6,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "sequence_parallel": section,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    torch.manual_seed(5)
    tokens = torch.randint(5, 90, (ROWS, LENGTH))
    labels = tokens.masked_fill(torch.rand(ROWS, LENGTH) < 0.3, -100)
    found = {}
    for name, given in (
        ("labels", {"labels": labels}),
        ("items", {"labels": labels, "num_items_in_batch": 7}),
        ("shifted", {"shift_labels": labels}),
    ):
        output = engine(input_ids=tokens, fused_lm_head=True, **given)
        expected = alone(input_ids=tokens, fused_lm_head=True, **given)
        assert output.keys() == expected.keys()
        for field, value in output.items():
            assert value.shape == expected[field].shape, field
            found[f"{name}.{field}"] = float((value.double() - expected[field].double()).abs().max())
        # As a trainer may: of the loss and of what it makes of entropies.
        engine.backward(output.loss + 0.1 * output.entropy.mean())
        (expected.loss + 0.1 * expected.entropy.mean()).backward()
        engine.step()
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                theirs -= 0.1 * theirs.grad
                found[f"{name}.weights"] = max(found.get(f"{name}.weights", 0.0), float((mine - theirs).abs().max()))
                theirs.grad = None
    return found
