"""A tokenizer of single letters for the tiny models, and the rows that they are asked."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from experiments.what_is_read.zoo import VOCAB

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
WORDS = [
    "the",
    "red",
    "fox",
    "asks",
    "what",
    "two",
    "and",
    "two",
    "make,",
    "and",
    "why",
    "rain",
    "falls",
    "on",
    "a",
    "hill",
    "at",
    "noon",
    "or",
    "in",
    "the",
    "night",
]
ROWS = ((5, 9, 13, 70, 40, 22), (31, 8, 66, 12))
"""Token rows on which logits are compared."""


@cache
def tokenizer(added: int = 0) -> Any:
    """The tokenizer, with so many added tokens behind its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 32 + VOCAB - 3)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    found.chat_template = TEMPLATE
    if added:
        found.add_tokens([f"<|extra_{i}|>" for i in range(added)])
    return found


def write_rows(file: Path, n: int, *, seed: int, answers: bool = False) -> Path:
    """A log of short prompts, with or without answers."""
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(n):
            row = {"prompt": " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))}
            if answers:
                row["response"] = " ".join(rng.choices(WORDS, k=3))
            out.write(json.dumps(row) + "\n")
    return file
