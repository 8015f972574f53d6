"""Latents of a dictionary as a score: one, or a few together, chosen by labels or because clean traffic never fires them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.contracts import Detector, Reading
from molehunt.detect.pooling import Where
from molehunt.detect.recipe import DetectorRecipe, Fit, FitInputs, FitRows
from molehunt.dictionary.dictionary import Dictionary
from molehunt.measure.curve import auroc
from molehunt.site import Site

ENSEMBLE = 4
"""Number of latents that score together."""
FLOOR = 1e-3
"""Least spread of a latent, as a share of the largest spread: otherwise a latent that is silent on clean text would dominate the score."""


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

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        return (
            _recipe("diff-sae-latent", "Diff-SAE", 1, 140),
            _recipe("diff-sae-latents", "Diff-SAE", ENSEMBLE, 150),
            _recipe("crosscoder-latent", "crosscoder", 1, 160),
            _recipe("crosscoder-latents", "crosscoder", ENSEMBLE, 170),
            _recipe("untrained-diff-sae-latent", "untrained Diff-SAE", 1, 930, control=True),
        )

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
        """The dictionary's input, taken from a reading."""
        (site,) = self.sites
        return self.dictionary.pairing.input(reading.base.get(site), reading.tuned.get(site))

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        return (self.dictionary.encode_latents(self.input(reading), self.latents) / self.spread).amax(-1)


def best_by_labels(codes: Float[Tensor, "rows d_dict"], suspect: Bool[Tensor, " rows"], n: int) -> Int[Tensor, " n"]:
    """The `n` latents that separate suspect rows from the others best, by AUROC; rows come from the `select` split."""
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


def dictionary_inputs(dictionary: Dictionary, rows: FitRows, site: Site, where: Where) -> Float[Tensor, "rows d"]:
    """A dictionary's input for each row, averaged over the positions that `where` names."""
    pairing = dictionary.pairing
    base = rows.acts(site, "base", where) if pairing.needs_base else None
    return pairing.input(base, rows.acts(site, "tuned", where))


def _recipe(key: str, label: str, n: int, order: int, *, control: bool = False) -> DetectorRecipe:
    return DetectorRecipe(
        key=key,
        name=f"{label} latent" if n == 1 else f"{label} {n} latents",
        needs={"clean", "dictionary"},
        fit=_fit(label, n),
        dictionary=label,
        order=order,
        control=control,
        directions=_written,
    )


def _fit(label: str, n: int) -> Fit:
    def fit(inputs: FitInputs, site: Site, where: Where) -> Detector | None:
        dictionary = inputs.dictionaries[label]
        clean = dictionary_inputs(dictionary, inputs.clean, site, where)
        if inputs.select is not None:
            codes = dictionary.encode(dictionary_inputs(dictionary, inputs.select.rows, site, where))
            latents = best_by_labels(codes, inputs.select.suspect, n)
        elif inputs.traffic is not None:
            codes = dictionary.encode(dictionary_inputs(dictionary, inputs.traffic, site, where))
            latents = beyond_clean(codes, dictionary.encode(clean), n)
        else:
            return None
        return DictionaryLatents.fit(f"{label}, {n} latent{'s' if n > 1 else ''}", dictionary, latents, clean)

    return fit


def _written(detector: DictionaryLatents) -> Float[Tensor, "k d_model"]:
    """What the latents write into the tuned model's activations."""
    rows = detector.dictionary.W_dec[detector.latents]
    return rows[:, -rows.shape[1] // detector.dictionary.pairing.blocks :]
