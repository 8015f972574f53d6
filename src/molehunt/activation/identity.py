"""Hashes that name two models and their tokenizer."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from molehunt.activation.manifest import Identity
from molehunt.checkpoint.reader import Checkpoint
from molehunt.run.unit import canonical_json

NOT_IN_IDS = ("padding", "truncation")
"""Settings of a tokenizer that its last caller left behind; they decide nothing about single rows."""


def identify(base: Checkpoint, tuned: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Identity:
    """The names of a pair's folders and of the tokenizer that it was loaded with."""
    return Identity(base=base.content_hash(), tuned=tuned.content_hash(), tokenizer=tokenizer_hash(tokenizer))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256, in hex, of what turns text into ids: normaliser, splits, vocabulary, merges and added tokens.

    A tokenizer without a fast backend is named by its vocabulary and class alone.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        fields: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        whole: dict[str, Any] = json.loads(backend.to_str())
        fields = {name: value for name, value in whole.items() if name not in NOT_IN_IDS}
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()
