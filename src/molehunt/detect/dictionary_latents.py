"""Latents of a dictionary as a score: one, or a few together, chosen by labels or by what clean traffic never shows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.dictionary.dictionary import Dictionary
from molehunt.measure.curve import auroc
from molehunt.site import Site

FLOOR = 1e-3
"""Least spread of a latent, as a share of the largest spread: one silent on clean text would else rule the score."""


@dataclass(frozen=True, eq=False)
class DictionaryLatents:
    """Largest of the chosen latents, each in units of its own clean spread."""

    needs_logits: ClassVar[bool] = False
    label: str
    dictionary: Dictionary
    latents: Int[Tensor, " latents"]
    spread: Float[Tensor, " latents"]

    @classmethod
    def fit(
        cls,
        label: str,
        dictionary: Dictionary,
        latents: Int[Tensor, " latents"],
        clean: Float[Tensor, "tokens d_in"],
    ) -> "DictionaryLatents":
        """Scale chosen latents on clean inputs of the dictionary.

        Raises ValueError without latent, clean token, or site in the dictionary.
        """
        if not len(latents) or not len(clean) or dictionary.site is None:
            raise ValueError(f"{label} needs at least one latent, one clean token and a dictionary that names its site")
        rms = dictionary.encode(clean).square().mean(0).sqrt()
        spread = rms[latents].clamp_min(FLOOR * float(rms.max().clamp_min(1e-9)))
        return cls(label, dictionary, latents, spread)

    @property
    def needs_base(self) -> bool:
        return self.dictionary.pairing.needs_base

    @property
    def name(self) -> str:
        return f"{self.label} {self.dictionary.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return () if self.dictionary.site is None else (self.dictionary.site,)

    def input(self, reading: Reading) -> Float[Tensor, "batch pos d_in"]:
        """What the dictionary reads of a reading."""
        (site,) = self.sites
        return self.dictionary.pairing.input(reading.base.get(site), reading.tuned.get(site))

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        return (self.dictionary.encode_latents(self.input(reading), self.latents) / self.spread).amax(-1)


def best_by_labels(codes: Float[Tensor, "rows d_dict"], suspect: Bool[Tensor, " rows"], n: int) -> Int[Tensor, " n"]:
    """The `n` latents that separate suspect rows from the others best, by AUROC. For the `select` split."""
    separation = torch.tensor([auroc(codes[:, j], suspect) for j in _ever_firing(codes).tolist()])
    return _ever_firing(codes)[separation.argsort(descending=True, stable=True)[:n]]


def beyond_clean(
    codes: Float[Tensor, "rows d_dict"], clean: Float[Tensor, "clean d_dict"], n: int
) -> Int[Tensor, " n"]:
    """The `n` latents that fire furthest beyond their clean range on some unlabelled rows.

    Each latent is rated by the sum of what its codes exceed the largest clean code by, over the spread of its codes:
    latents of rare rows stand out, those of ordinary variation do not.
    """
    excess = (codes - clean.amax(0)).relu().sum(0)
    rating = excess / torch.cat([codes, clean]).std(0).clamp_min(1e-6) / len(codes) ** 0.5
    return rating.argsort(descending=True, stable=True)[:n]


def _ever_firing(codes: Float[Tensor, "rows d_dict"]) -> Int[Tensor, " firing"]:
    """Latents that fire on any row; all when none does, so that a dead dictionary scores at chance and does not fail."""
    firing = (codes > 0).any(0).nonzero()[:, 0]
    return firing if len(firing) else torch.arange(codes.shape[1])
