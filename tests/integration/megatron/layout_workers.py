"""What the ranks of `dsp_plugin.spawn` do in the tests of contiguous order."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron_workers import initialized, message

from dsp_plugin.patches import cpu, megatron

LENGTH = 24


def cuts() -> dict[str, bool]:
    """Whether each place where Megatron cuts a sequence gives this rank its run of it."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = slice(rank * LENGTH // size, (rank + 1) * LENGTH // size)
    with initialized("lightseq", context_parallel_size=size) as parallel_state:
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
        from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
        from megatron.core.transformer.multi_token_prediction import roll_tensor

        group = parallel_state.get_context_parallel_group()
        batch = {
            "tokens": torch.arange(2 * LENGTH).view(2, LENGTH),
            "attention_mask": torch.rand(2, 1, LENGTH, LENGTH) < 0.5,
            "labels": None,
        }
        cut = cut_batch(dict(batch), group)
        found = {
            "tokens": torch.equal(cut["tokens"], batch["tokens"][:, mine]),
            "attention mask": torch.equal(cut["attention_mask"], batch["attention_mask"][:, :, mine]),
            "nothing": cut["labels"] is None,
        }
        rotary = RotaryEmbedding(8, 1.0, use_cpu_initialization=True, cp_group=group)
        found["rotary"] = torch.equal(rotary(LENGTH), rotary.get_emb(LENGTH)[mine])
        yarn = YarnRotaryEmbedding(8, 1.0, use_cpu_initialization=True, cp_group=group)
        found["yarn"] = torch.equal(yarn(LENGTH)[0], yarn(LENGTH, packed_seq=True)[0][mine])
        shifted = torch.cat([batch["tokens"][:, 1:], torch.zeros(2, 1, dtype=torch.int64)], 1)[:, mine]
        rolled, total = roll_tensor(cut["tokens"], shifts=-1, dims=-1, cp_group=group)
        found["roll"] = torch.equal(rolled, shifted) and total == shifted.sum()
        alone = parallel_state.get_tensor_model_parallel_group()
        found["one rank"] = torch.equal(cut_batch(dict(batch), alone)["tokens"], batch["tokens"])
    return found


def cut_batch(batch: dict[str, Any], group: Any) -> dict[str, Any]:
    """Megatron's function; 0.19 asks for one argument more than 0.16."""
    from megatron.core import utils

    accepted = inspect.signature(utils.get_batch_on_this_cp_rank).parameters
    hybrid = {"is_hybrid_cp": False} if "is_hybrid_cp" in accepted else {}
    return utils.get_batch_on_this_cp_rank(batch, cp_group=group, **hybrid)


def refused() -> dict[str, str]:
    """What contiguous order cannot serve, each with the error on this rank."""
    found = {}
    with initialized("lightseq", context_parallel_size=dist.get_world_size()) as parallel_state:
        group = parallel_state.get_context_parallel_group()
        found["uneven"] = message(lambda: cut_batch({"tokens": torch.zeros(1, LENGTH + 1)}, group))
        from megatron.core.ssm.gated_delta_net import GatedDeltaNet

        config = SimpleNamespace(context_parallel_size=dist.get_world_size())
        found["layer"] = message(lambda: GatedDeltaNet(config, None))
    for name, settings in {
        "striped": {"method": "ring", "layout": "striped"},
        "zigzag": {"method": "lightseq", "layout": "zigzag"},
    }.items():
        found[name] = message(lambda settings=settings: megatron.install(**settings))
    return found


def early_importer() -> dict[str, str]:
    """Installs when a module has imported the rotary slicer already: for a zigzag method, then for a contiguous one."""
    cpu.install()
    from megatron.core.models.common.embeddings import rope_utils

    script = ModuleType("users_script")
    script.get_pos_emb_on_this_cp_rank = rope_utils.get_pos_emb_on_this_cp_rank
    sys.modules[script.__name__] = script
    found = {}
    for method in ("ring", "lightseq"):
        found[method] = message(lambda method=method: megatron.install(method))
        megatron.uninstall()
    return found
