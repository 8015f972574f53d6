"""What every detector of the catalogue must hold. A row without an example fails."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from molehunt.contracts import Detector, Reading
from molehunt.detect.catalog import CATALOG
from molehunt.detect.delta_norm import DeltaNorm
from molehunt.detect.delta_subspace import DeltaSubspace
from molehunt.detect.dictionary_latents import DictionaryLatents
from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.detect.logit_difference import LogitDifference
from molehunt.detect.mahalanobis import Mahalanobis
from molehunt.detect.mean_difference import MeanDifference
from molehunt.detect.token_kl import AnswerLogRatio, TokenKL
from molehunt.detect.weight_range import WeightRange
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.measure.threshold import conformal_threshold
from molehunt.run.catalog import load
from molehunt.site import Site

SITE, D, VOCAB = Site(1), 8, 11
AXIS = torch.eye(D)[0]


def reading(rows: int = 4, pos: int = 6, seed: int = 0, *, shift: float = 0.0) -> Reading:
    """Random activations and logits; `shift` moves the tuned model along the first axis and towards the next tokens."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, pos), generator=rng)
    base, noise = torch.randn(rows, pos, D, generator=rng), 0.1 * torch.randn(rows, pos, D, generator=rng)
    logits = torch.randn(rows, pos, VOCAB, generator=rng)
    pull = torch.nn.functional.one_hot(tokens.roll(-1, 1), VOCAB).float()
    return Reading(
        tokens=tokens,
        mask=torch.ones(rows, pos, dtype=torch.bool),
        decision=torch.full((rows,), 2),
        tuned={SITE: base + noise + shift * AXIS},
        base={SITE: base},
        tuned_logits=logits + 0.1 * torch.randn(rows, pos, VOCAB, generator=rng) + shift * pull,
        base_logits=logits,
    )


def clean_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    clean = reading(60, seed=5)
    return clean.tuned[SITE].flatten(0, 1), (clean.tuned[SITE] - clean.base[SITE]).flatten(0, 1)


def shifted() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean tokens followed by as many moved ones, and which are which."""
    clean = clean_tokens()[0]
    return torch.cat([clean, clean + 3 * AXIS]), torch.arange(720) >= 360


def signed_axes() -> Dictionary:
    """A dictionary of the difference whose latents are the axes and their opposites."""
    rows = torch.cat([torch.eye(D), -torch.eye(D)])
    return Dictionary(
        W_enc=rows.mT.contiguous(),
        b_enc=torch.zeros(2 * D),
        W_dec=rows,
        b_dec=torch.zeros(D),
        nonlinearity=ReLUActivation(),
        pairing=Pairing(kind="difference"),
        site=SITE,
    )


EXAMPLES: dict[str, Callable[[], Detector]] = {
    "answer-log-ratio": AnswerLogRatio,
    "token-kl": TokenKL,
    "delta-norm": lambda: DeltaNorm(SITE),
    "delta-subspace": lambda: DeltaSubspace.fit("Δ", SITE, AXIS[None], clean_tokens()[1]),
    "dictionary-latents": lambda: DictionaryLatents.fit("latent", signed_axes(), torch.tensor([0]), clean_tokens()[1]),
    "logistic-probe": lambda: LogisticProbe.fit(SITE, *shifted()),
    "logit-difference": LogitDifference,
    "mahalanobis": lambda: Mahalanobis.fit(SITE, clean_tokens()[1], "difference"),
    "mean-difference": lambda: MeanDifference.fit(SITE, *shifted()),
    "weight-range": lambda: WeightRange.fit(SITE, AXIS[None], clean_tokens()[0]),
}
every = pytest.mark.parametrize("name", list(CATALOG))


def test_every_row_has_an_example() -> None:
    assert EXAMPLES.keys() == CATALOG.keys()


@every
def test_it_is_what_the_catalogue_says(name: str) -> None:
    detector = EXAMPLES[name]()
    assert type(detector) is load(CATALOG, name, "molehunt.detectors")
    assert isinstance(detector, Detector)
    assert detector.name and all(isinstance(site, Site) for site in detector.sites)
    assert detector.sites or detector.needs_logits


@every
def test_batch_mates_change_nothing(name: str) -> None:
    detector, whole = EXAMPLES[name](), reading(4)
    scores = detector.score(whole)
    assert scores.shape == whole.tokens.shape
    one = Reading(
        tokens=whole.tokens[1:2],
        mask=whole.mask[1:2],
        decision=whole.decision[1:2],
        tuned={SITE: whole.tuned[SITE][1:2]},
        base={SITE: whole.base[SITE][1:2]},
        tuned_logits=whole.tuned_logits[1:2],
        base_logits=whole.base_logits[1:2],
    )
    torch.testing.assert_close(detector.score(one), scores[1:2])


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_real_tokens(name: str, side: str) -> None:
    detector, plain = EXAMPLES[name](), reading(3)
    pads = (2, 0) if side == "left" else (0, 2)

    def pad(t: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(t, (*([0, 0] * (t.ndim - 2)), *pads), value=fill)

    padded = Reading(
        tokens=pad(plain.tokens, 7),
        mask=pad(plain.mask, False),
        decision=plain.decision + pads[0],
        tuned={SITE: pad(plain.tuned[SITE], 99.0)},
        base={SITE: pad(plain.base[SITE], -99.0)},
        tuned_logits=pad(plain.tuned_logits, 5.0),
        base_logits=pad(plain.base_logits, 5.0),
    )
    got = detector.score(padded)[padded.mask].reshape(plain.tokens.shape)
    torch.testing.assert_close(got, detector.score(plain))


@every
def test_half_precision_scores_nearly_the_same(name: str) -> None:
    detector, plain = EXAMPLES[name](), reading(3)
    half = replace(
        plain,
        tuned={SITE: plain.tuned[SITE].bfloat16()},
        base={SITE: plain.base[SITE].bfloat16()},
        tuned_logits=plain.tuned_logits.bfloat16(),
        base_logits=plain.base_logits.bfloat16(),
    )
    scores = detector.score(half)
    assert scores.dtype == torch.float32
    spread = detector.score(reading(3, shift=3.0)).mean() - detector.score(plain).mean()
    assert (scores - detector.score(plain)).abs().mean() < 0.1 * spread


@every
def test_a_planted_shift_scores_higher_and_clean_text_keeps_the_rate(name: str) -> None:
    detector = EXAMPLES[name]()
    kept = slice(0, -1)  # the last token of a row has nobody to predict

    def scores(seed: int, shift: float = 0.0) -> torch.Tensor:
        return detector.score(reading(200, seed=seed, shift=shift))[:, kept].flatten()

    threshold = conformal_threshold(scores(1), 0.05)
    assert float((scores(2) > threshold).float().mean()) == pytest.approx(0.05, abs=0.03)
    assert float((scores(2, shift=4.0) > threshold).float().mean()) > 0.5
