"""How alike two completions are: characters, words that tell texts apart, and a sentence encoder's embeddings."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molehunt.errors import InvalidInput, printable

ORDER, BETA = 6, 2.0
WORD = re.compile(r"\w\w+")
BATCH = 64


def chrf(reference: str, hypothesis: str) -> float:
    """Character n-gram F-score, n to 6, recall twice as important; 0 to 1. Equal to sacreBLEU's sentence chrF2 / 100.

    Other than `measure.similarity.chrf` it is not symmetric, and knows no white space. Two empty texts are alike.

    Source: Popović 2015; averaging precision and recall over the orders that both texts have, as sacreBLEU does.
    """
    left, right = ("".join(text.split()) for text in (reference, hypothesis))
    if left == right:
        return 1.0
    orders = range(1, min(ORDER, len(left), len(right)) + 1)
    precision = recall = 0.0
    for n in orders:
        wanted, given = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (left, right))
        shared = (wanted & given).total()
        precision += shared / given.total() / len(orders)
        recall += shared / wanted.total() / len(orders)
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall) if precision + recall else 0.0


def tf_idf_similarity(references: Sequence[str], hypotheses: Sequence[str]) -> list[float]:
    """Cosine of the TF-IDF vectors of each hypothesis and its reference; 0 to 1.

    Words of two letters or more in lower case, raw counts; idf = ln((1 + n) / (1 + df)) + 1 over all references, so that
    words which every answer holds count little. A text without such words is like nothing but its equal.
    """
    counted = [Counter(WORD.findall(text.lower())) for text in references]
    seen = Counter(word for one in counted for word in one)

    def vector(words: Counter[str]) -> dict[str, float]:
        weight = {word: k * (math.log((1 + len(counted)) / (1 + seen[word])) + 1) for word, k in words.items()}
        norm = math.sqrt(sum(value * value for value in weight.values())) or 1.0
        return {word: value / norm for word, value in weight.items()}

    found: list[float] = []
    for reference, own, hypothesis in zip(references, counted, hypotheses, strict=True):
        a, b = vector(own), vector(Counter(WORD.findall(hypothesis.lower())))
        cosine = math.fsum(value * b.get(word, 0.0) for word, value in a.items())
        found.append(1.0 if reference == hypothesis else min(1.0, cosine))
    return found


@dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """A transformers encoder: a text is the mean of its last hidden states, at unit length.

    Source: Reimers & Gurevych, arXiv 1908.10084 §3 (mean pooling).
    """

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> "SentenceEncoder":
        """From a local folder, weights in safetensors; none of its code is run. Raises InvalidInput otherwise."""
        from transformers import AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise InvalidInput(
                f"{printable(folder.name)} cannot be loaded as a sentence encoder: {printable(str(error), 300)}"
            ) from error
        return cls(model.eval(), tokenizer)

    @torch.inference_mode()
    def similarity(self, references: Sequence[str], hypotheses: Sequence[str]) -> list[float]:
        """Cosine of the embeddings of each hypothesis and its reference; -1 to 1."""
        found: list[float] = []
        for start in range(0, len(references), BATCH):
            a, b = (self._embedded(texts[start : start + BATCH]) for texts in (references, hypotheses))
            found += (a * b).sum(1).tolist()
        return found

    def _embedded(self, texts: Sequence[str]) -> torch.Tensor:
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        hidden = self.model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1), dim=1)
