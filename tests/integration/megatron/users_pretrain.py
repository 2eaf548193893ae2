"""A user's Megatron-LM training script, which knows nothing of the plugin, in the form that such scripts have.

A model provider from its own folder, a provider of datasets, arguments of its own, and a forward step that cuts its
batch for tensor and for context parallel ranks, watched by Megatron's timers, straggler detector and rerun machine.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, inprocess_restart, pretrain, set_startup_timestamps
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from users_model import gpt_builder, model_provider

KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "attention_mask",
    "position_ids",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
)
stimer = StragglerDetector()
consumed: list[list[int]] = []


def add_arguments(parser: Any) -> Any:
    """This script's own."""
    group = parser.add_argument_group("script")
    group.add_argument("--note", default="as usual", help="printed when the model is built")
    group.add_argument("--from-config", action="store_true", help="a hybrid, which Megatron builds from its arguments")
    group.add_argument("--batches-out", type=Path, help="folder for the tokens that each rank was given")
    return parser


def get_batch(batches: Any, vp_stage: int | None) -> dict[str, Any]:
    """A microbatch, broadcast from the first tensor-parallel rank and cut for this context-parallel one."""
    args = get_args()
    documents = args.dataloader_inter_document_masking
    if not is_first_or_last_pipeline_stage(vp_stage) and not documents:
        return dict.fromkeys(KEYS)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        data = next(batches)
        batch = {key: data[key].cuda(non_blocking=True) if data.get(key) is not None else None for key in KEYS}
        consumed.append(batch["tokens"].flatten().tolist())
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        flatten_batch_for_packed_sequences(batch),
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=documents,
    )


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Summed loss, token count, and what Megatron logs."""
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1).float())
    tokens = loss_mask.sum().clone().detach().to(torch.int)
    get_rerun_state_machine().validate_result(
        result=loss, rejection_func=torch.isnan, message="the loss is not a number", tolerance=0.0, fatal=True
    )
    return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}


def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """One microbatch through one model chunk."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch = get_batch(batches, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    packed = None
    if batch.get("cu_seqlens") is not None:
        borders, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"].item())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            total_tokens=int(borders[-1].item()),
        )
    with stimer:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            packed_seq_params=packed,
            loss_mask=batch["loss_mask"],
        )
    return output, partial(loss_func, batch["loss_mask"])


def is_dataset_built_on_rank(vp_stage: int | None = None) -> bool:
    """Only where somebody reads it."""
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


def train_valid_test_datasets_provider(samples: list[int], vp_stage: int | None = None) -> Any:
    """Mock or indexed data, as the command line says."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    built = partial(is_dataset_built_on_rank, vp_stage=vp_stage)
    return BlendedMegatronDatasetBuilder(dataset, samples, built, config).build()


if __name__ == "__main__":
    set_startup_timestamps()
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(extra_args_provider=add_arguments, args_defaults={"tokenizer_type": "NullTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, hybrid_config_from_args(args) if args.from_config else None),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=partial(model_provider, gpt_builder),
        store=store,
    )
    if args.batches_out is not None:
        args.batches_out.mkdir(parents=True, exist_ok=True)
        (args.batches_out / f"rank-{args.rank}.json").write_text(json.dumps(consumed))
