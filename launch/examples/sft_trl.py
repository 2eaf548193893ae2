r"""TRL's SFTTrainer fine-tunes a causal language model on conversations; the script knows nothing of sequences.

    torchrun --nproc-per-node 8 -m dsp_plugin.launch launch/examples/sft_trl.py \
        --deepspeed configs/deepspeed/sft_ring_zero3.json --model_name_or_path Qwen/Qwen3-8B \
        --dataset_name trl-lib/Capybara --packing --max_length 131072 --output_dir out

Without ``--model_name_or_path`` it is a small model with random weights and a tokenizer of a hundred words, and without
``--dataset_name`` the conversations are made on the fly. On CPU, put ``DS_ACCELERATOR=cpu LOCAL_SIZE=2`` before it and
``--bf16 false`` behind.
"""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]
WORDS = [f"word{number}" for number in range(96)]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% generation %}"
    "{{ message['content'] + ' <eos> ' }}{% endgeneration %}{% endfor %}"
)


def made_up(count: int) -> DatasetDict:
    """Conversations in which the answer repeats what was asked."""
    drawn = random.Random(0)

    def turn() -> list[dict[str, str]]:
        content = " ".join(drawn.choices(WORDS, k=drawn.randint(4, 24)))
        return [{"role": "user", "content": content}, {"role": "assistant", "content": content}]

    rows = [{"messages": turn() + turn()} for _ in range(count)]
    held_out = max(count // 8, 1)
    return DatasetDict(train=Dataset.from_list(rows[held_out:]), test=Dataset.from_list(rows[:held_out]))


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Random weights, and a tokenizer that takes text at its spaces."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    """Trains, evaluates and saves."""
    kinds: Any = (ScriptArguments, SFTConfig, ModelConfig)
    data, training, named = TrlParser(kinds).parse_args_and_config()
    set_seed(training.seed)
    model: Any = named.model_name_or_path
    tokenizer = None
    if model is None:
        model, tokenizer = small_model()
    rows = made_up(64) if data.dataset_name is None else load_dataset(data.dataset_name, name=data.dataset_config)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=rows[data.dataset_train_split],
        eval_dataset=rows[data.dataset_test_split],
        processing_class=tokenizer,
        peft_config=get_peft_config(named),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
