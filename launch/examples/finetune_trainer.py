"""Transformers' Trainer fine-tunes a causal language model on long documents; the script knows nothing of sequences.

    torchrun --nproc-per-node 8 -m dsp_plugin.launch launch/examples/finetune_trainer.py \
        --deepspeed configs/deepspeed/trainer_ring_zero3.json --model Qwen/Qwen3-8B --seq-length 131072 --bf16 \
        --output_dir out

Without ``--model`` it is a small one with random weights, and without ``--text`` the documents are made on the fly: a
few motifs that come again, so that what came long before helps. On CPU, put ``DS_ACCELERATOR=cpu LOCAL_SIZE=2`` before
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class Arguments:
    """What is trained on what."""

    model: str | None = field(default=None, metadata={"help": "name or folder of a model; a small one if left out"})
    text: Path | None = field(default=None, metadata={"help": "a file of text; made on the fly if left out"})
    seq_length: int = field(default=256, metadata={"help": "tokens of a row"})
    rows: int = field(default=64, metadata={"help": "rows that are made on the fly"})


class Rows(Dataset):
    """Tokens cut into rows of one length."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def made_up(count: int) -> torch.Tensor:
    """Motifs of 16 tokens, 12 of them, in random order."""
    generator = torch.Generator().manual_seed(0)
    motifs = torch.randint(0, 128, (12, 16), generator=generator)
    return motifs[torch.randint(0, 12, (-(-count // 16),), generator=generator)].flatten()[:count]


def main() -> None:
    """Trains and evaluates."""
    parser = HfArgumentParser((Arguments, TrainingArguments))  # type: ignore[arg-type]
    options, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    model: PreTrainedModel
    if options.model is None:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=options.seq_length,
            )
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if training.bf16 else None)
    if options.text is None:
        tokens = made_up(options.rows * options.seq_length)
    else:
        tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), return_tensors="pt").input_ids[
            0
        ]
    rows = Rows(tokens, options.seq_length)
    held_out = max(len(rows) // 8, 1)
    train, evaluate = torch.utils.data.random_split(
        rows, [len(rows) - held_out, held_out], torch.Generator().manual_seed(0)
    )
    trainer = Trainer(model=model, args=training, train_dataset=train, eval_dataset=evaluate)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
