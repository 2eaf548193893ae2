"""Pretrains a GPT on indexed or mock data with `megatron.training.pretrain`, as megatron-core 0.19 has it.

An ordinary Megatron training script: Megatron parses the command line, builds the model from it, trains, evaluates and
saves. The data is what Megatron's own flags say: --mock-data, or --data-path PREFIX of the .bin and .idx files that
`megatron.core.datasets.indexed_dataset` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor


def datasets(samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Train, validation and test sets of the asked sizes, on every rank."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split="98,1,1" if args.mock_data else args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, samples, lambda: True, config).build()


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, token count, and what Megatron's log averages over data-parallel ranks."""
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """One microbatch, cut for this context-parallel rank."""
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(batches).items()}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    losses = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


def main() -> None:
    """Trains as the command line says."""
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )


datasets.is_distributed = True  # type: ignore[attr-defined]

if __name__ == "__main__":
    main()
