"""How good a dictionary is: what it fails to reconstruct, how sparse it is, and what that costs the model."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from molehunt.activation.scale import sinks
from molehunt.activation.shuffle import PairBatch
from molehunt.contracts import Intervention, Reading
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import NotTestable, UsageError
from molehunt.model.likelihood import LOGIT_BYTES
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site

LEAST_COST = 1e-3
"""Nats a token that the reference must cost, or there is no loss to recover."""
BATCH_TOKENS = 4096
"""Tokens, padding included, in one forward pass; fewer where their logits would not fit into `LOGIT_BYTES`."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A number, and the number of tokens that it was measured on."""

    value: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplicedLoss:
    """Next-token loss of a model in nats: as it is, with the reconstruction spliced in, and with the mean instead."""

    clean: float
    spliced: float
    reference: float
    kl_spliced: float
    """KL(as it is ‖ spliced), nats a token."""
    kl_reference: float
    n: int
    """Tokens predicted."""

    @property
    def recovered(self) -> float | None:
        """1 when splicing costs nothing, 0 when it costs as much as the mean; None when the mean costs nothing."""
        cost = self.reference - self.clean
        return (self.reference - self.spliced) / cost if cost > LEAST_COST else None

    @property
    def kl_recovered(self) -> float | None:
        """1 when splicing leaves predictions as they are, 0 when it changes them as much as the mean does.

        It says something of differences, too, without which a model may predict better than with them.
        """
        return 1 - self.kl_spliced / self.kl_reference if self.kl_reference > LEAST_COST else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Quality of one dictionary on one stream of tokens."""

    fvu: Measured
    """Share of the variance about the mean that is not reconstructed, in the pairing's own error."""
    l0: Measured
    """Latents that fire on a token."""
    dead: Measured
    """Share of the latents that fire on none of the tokens."""
    loss: SplicedLoss | None = None
    """None when no models were given."""

    @property
    def loss_recovered(self) -> Measured | None:
        return None if self.loss is None else _measured(self.loss.recovered, self.loss.n)

    @property
    def kl_recovered(self) -> Measured | None:
        return None if self.loss is None else _measured(self.loss.kl_recovered, self.loss.n)

    def to_json(self) -> dict[str, Any]:
        recovered = {"loss_recovered": self.loss_recovered, "kl_recovered": self.kl_recovered}
        return {**asdict(self), **{name: value and asdict(value) for name, value in recovered.items()}}


@torch.no_grad()
def measure_quality(
    dictionary: Dictionary,
    batches: Iterable[PairBatch],
    *,
    pair: ModelPair | None = None,
    rows: Sequence[Sequence[int]] = (),
    site: Site | None = None,
    track: Track = silent,
) -> Quality:
    """Fit and sparsity on `batches`; the loss on `rows` too, where models are given.

    Args:
        dictionary: on any device; batches are moved there.
        batches: of its site, once each.
        pair: models to splice reconstructions into (see `spliced_loss`).
        rows: token ids that the models are run on.
        site: where; the dictionary's own by default.
        track: shows each batch.

    Raises:
        NotTestable: no batch, activations that do not vary, or a transcoder.
        UsageError: activations of another width, or no site is known.
    """
    _refuse_transcoder(dictionary)
    device = dictionary.W_enc.device
    missed, square, n, l0 = 0.0, 0.0, 0, 0
    total = torch.zeros(dictionary.d_in, dtype=torch.float64, device=device)
    fired = torch.zeros(dictionary.d_dict, dtype=torch.bool, device=device)
    for batch in track(batches, "measuring the dictionary"):
        x = dictionary.pairing.input(batch.base.to(device), batch.tuned.to(device))
        code = dictionary.encode(x)
        error = x.double() - dictionary.decode(code, x)
        missed += float(dictionary.pairing.squared_error(error).sum())
        square += float(dictionary.pairing.squared_error(x.double()).sum())
        total += x.sum(0, dtype=torch.float64)
        fires = code > 0
        fired |= fires.any(0)
        l0 += int(fires.sum())
        n += len(x)
    if not n:
        raise NotTestable("There is no token to measure the dictionary on. Harvest more traffic.")
    mean = total / n
    variance = square - n * float(dictionary.pairing.squared_error(mean[None]))
    if variance <= 1e-9 * square:
        raise NotTestable("The activations do not vary, so no share of their variance can be reconstructed.")
    return Quality(
        fvu=Measured(missed / variance, n),
        l0=Measured(l0 / n, n),
        dead=Measured(float((~fired).double().mean()), n),
        loss=None if pair is None else spliced_loss(dictionary, pair, rows, mean=mean.float(), site=site, track=track),
    )


@torch.inference_mode()
def spliced_loss(
    dictionary: Dictionary,
    pair: ModelPair,
    rows: Sequence[Sequence[int]],
    *,
    mean: Float[Tensor, " d_in"],
    site: Site | None = None,
    track: Track = silent,
) -> SplicedLoss:
    """What it costs the tuned model to go on from the dictionary's reconstruction of its activations.

    A dictionary of the difference puts base activation + reconstructed difference in place; one of both models its half
    for the tuned one; one of the base is spliced into the base. Sinks stay as they are: dictionaries are not trained on
    them, and no model survives their loss.

    Args:
        dictionary: on any device.
        pair: the models.
        rows: token ids; rows of a single token predict nothing.
        mean: of the dictionary's inputs. The reference decodes nothing but this.
        site: where; the dictionary's own by default.
        track: shows rows.

    Raises:
        NotTestable: no row predicts a token, or a transcoder.
        UsageError: the width is not the model's, or no site is known.
        CannotTap: the model has no such site.
    """
    _refuse_transcoder(dictionary)
    site = _known_site(dictionary, pair, site)
    dictionary, mean = dictionary.to(pair.device), mean.to(pair.device)
    order = sorted((row for row in rows if len(row) > 1), key=len)
    if not order:
        raise NotTestable("No row has two tokens, so none predicts a token. Give longer traffic.")
    losses, kls, n = [0.0] * 3, [0.0] * 3, 0
    groups = list(_groups(order, min(BATCH_TOKENS, LOGIT_BYTES // (4 * pair.vocab_size))))
    for group in by_rows(track, groups, "splicing reconstructions"):
        reading = pair.read(group, sites=[site])
        followed = reading.tokens[:, 1:][reading.mask[:, 1:]]
        clean: Tensor | None = None
        for i, edit in enumerate(_edits(dictionary, reading, site, mean)):
            of_base = dictionary.pairing.kind == "base"
            log_probs = _log_probs(pair, reading.tokens, reading.mask, edit, of_base=of_base)
            clean = log_probs if clean is None else clean
            losses[i] += float(nll_loss(log_probs, followed, reduction="none").sum(dtype=torch.float64))
            kls[i] += float(kl_div(log_probs, clean, reduction="none", log_target=True).sum(dtype=torch.float64))
        n += len(followed)
    return SplicedLoss(
        clean=losses[0] / n,
        spliced=losses[1] / n,
        reference=losses[2] / n,
        kl_spliced=kls[1] / n,
        kl_reference=kls[2] / n,
        n=n,
    )


def _known_site(dictionary: Dictionary, pair: ModelPair, site: Site | None) -> Site:
    """The site that was given or the dictionary's own. Raises UsageError where none is known, or the width is wrong."""
    site = site or dictionary.site
    if site is None:
        raise UsageError("The dictionary's files do not say which site it belongs to; give one (--site L6.resid).")
    if dictionary.d_in != pair.d_model * dictionary.pairing.blocks:
        raise UsageError(
            f"The dictionary reads {dictionary.d_in // dictionary.pairing.blocks} values a token and model, and these "
            f"models have {pair.d_model}."
        )
    return site


def _edits(
    dictionary: Dictionary, reading: Reading, site: Site, mean: Float[Tensor, " d_in"]
) -> list[list[Intervention]]:
    """No edit, the reconstruction in place, and the mean in place, at every token that is no sink."""
    base, tuned, mask = reading.base[site], reading.tuned[site], reading.mask
    at = mask & ~sinks(base, mask) & ~sinks(tuned, mask)
    x = dictionary.pairing.input(base[at], tuned[at])
    edits: list[list[Intervention]] = [[]]
    for built in (dictionary.reconstruct(x), mean.expand_as(x)):
        edits.append([_Splice(site, at, _activation(dictionary, built, base[at]))])
    return edits


@dataclass(frozen=True, eq=False)
class _Splice:
    """Other activations where `at` is True."""

    site: Site
    at: Bool[Tensor, "batch pos"]
    values: Float[Tensor, "n d_model"]

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        edited = acts.clone()
        edited[self.at] = self.values.to(acts.dtype)
        return edited


def _activation(dictionary: Dictionary, built: Tensor, base: Tensor) -> Tensor:
    """What a reconstructed input says about one model's activation."""
    if dictionary.pairing.kind == "difference":
        return base.float() + built
    return built.chunk(dictionary.pairing.blocks, dim=-1)[-1]


def _groups(rows: Sequence[Sequence[int]], max_tokens: int) -> Iterable[list[Sequence[int]]]:
    """Rows of rising length, at most `max_tokens` padded tokens at a time."""
    group: list[Sequence[int]] = []
    for row in rows:
        if group and (len(group) + 1) * len(row) > max_tokens:
            yield group
            group = []
        group.append(row)
    yield group


def _log_probs(
    pair: ModelPair, tokens: Tensor, mask: Tensor, edits: Sequence[Intervention], *, of_base: bool
) -> Float[Tensor, "predicted vocab"]:
    """Log probabilities of the next token, at every token of right-padded rows that has one after it."""
    with (
        pair.base_model() if of_base else pair.tuned_model() as model,
        edit_sites(model, edits, layers_path=pair.layers_path),
    ):
        logits = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits
    return logits[:, :-1][mask[:, 1:]].float().log_softmax(-1)


def _measured(value: float | None, n: int) -> Measured | None:
    return None if value is None else Measured(value, n)


def _refuse_transcoder(dictionary: Dictionary) -> None:
    if dictionary.W_dec.shape[1] != dictionary.d_in or dictionary.W_skip is not None:
        raise NotTestable("This is a transcoder: what it writes is not what it reads, so there is no reconstruction.")
