"""A tiny model, tokenizer and data sets, as TRL's examples take them from the Hub."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(90)]
SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' <eos> ' }}"
    "{% else %}{{ '<assistant> ' }}{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def save_model(folder: Path) -> None:
    """Writes what ``from_pretrained`` reads."""
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_preferences(folder: Path) -> None:
    """Writes what `saved_preferences` reads."""
    preferences(8).save_to_disk(folder / "train")
    preferences(3).save_to_disk(folder / "test")


def saved_preferences(folder: Path) -> tuple[Dataset, Dataset]:
    """To train on, and to evaluate: from a disk that ranks share, since TRL writes what it precomputes beside it."""
    train, test = (load_from_disk(str(folder / part)) for part in ("train", "test"))
    return train, test


def texts(count: int = 12, shortest: int = 9, longest: int = 31) -> Dataset:
    """Plain text, of unlike lengths."""
    return Dataset.from_list([{"text": _words(at, shortest, longest)} for at in range(count)])


def completions(count: int = 12) -> Dataset:
    """Prompts and what follows them."""
    return Dataset.from_list(
        [{"prompt": _words(at, 5, 9), "completion": f" {_words(100 + at, 3, 15)}"} for at in range(count)]
    )


def chats(count: int = 12) -> Dataset:
    """Conversations of two turns each."""
    return Dataset.from_list([{"messages": _turn(at) + _turn(200 + at)} for at in range(count)])


def preferences(count: int = 8) -> Dataset:
    """Prompts with a chosen and a rejected completion."""
    return Dataset.from_list(
        [
            {
                "prompt": _words(at, 4, 9),
                "chosen": f" {_words(300 + at, 3, 12)}",
                "rejected": f" {_words(400 + at, 3, 12)}",
            }
            for at in range(count)
        ]
    )


def judged(count: int = 8) -> Dataset:
    """Completions that are desired, or not."""
    return Dataset.from_list(
        [
            {"prompt": _words(at, 4, 9), "completion": f" {_words(300 + at, 3, 12)}", "label": at % 3 != 0}
            for at in range(count)
        ]
    )


def prompts(count: int = 8) -> Dataset:
    """Prompts of one length."""
    return Dataset.from_list([{"prompt": _words(at, 6, 6)} for at in range(count)])


def _turn(seed: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": _words(seed, 3, 7)},
        {"role": "assistant", "content": _words(500 + seed, 3, 9)},
    ]


def _words(seed: int, shortest: int, longest: int) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choices(WORDS, k=drawn.randint(shortest, longest)))
