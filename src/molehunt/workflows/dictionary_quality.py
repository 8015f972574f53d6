"""Measure a dictionary: what it fails to explain, how sparse it is, and what splicing it in costs the models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from molehunt.activation.identity import identify
from molehunt.activation.manifest import Expected, check_expected
from molehunt.activation.shuffle import PairBatch, batches
from molehunt.activation.store import ActivationStore
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.detect import load_dictionary
from molehunt.dictionary.latents import latent_scaling, norm_bins, relative_norms
from molehunt.dictionary.pairing import Kind, Pairing
from molehunt.dictionary.quality import Quality, SplicedLoss, measure_quality
from molehunt.errors import UsageError, terminal_text
from molehunt.run.folder import RunFolder
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.traffic.world import benign_prompts
from molehunt.workflows.dictionary import BUFFER_TOKENS, refuse_unharvested
from molehunt.workflows.harvest import token_rows
from molehunt.workflows.inputs import Texts, examples
from molehunt.workflows.models import Models, OpenedModels, open_models
from molehunt.workflows.result import summary_html

EVAL_BATCH = 1024
"""Number of tokens encoded at once; their codes are held in memory in full."""
OWN_LATENT = 0.9
"""Relative decoder norm above which a latent of a crosscoder counts as the tuned model's."""


@dataclass(frozen=True, eq=False, kw_only=True)
class QualityResult:
    """How good a dictionary is on a store of activations."""

    site: Site
    dictionary: Dictionary
    quality: Quality
    latents: dict[str, int] | None = None
    """For a crosscoder: how many latents belong to which model."""

    def summary(self) -> str:
        """Reconstruction, sparsity, and the loss where models were given."""
        found = self.quality
        lines = [
            f"MEASURED at {self.site} ({self.dictionary.pairing.kind}), {self.dictionary.d_dict} latents, on {found.fvu.n} "
            "tokens",
            f"variance unexplained    {found.fvu.value:.4f}",
            f"latents a token         {found.l0.value:.2f}",
            f"latents that never fire {found.dead.value:.1%}",
        ]
        if found.loss is not None:
            lines += _loss_lines(found.loss)
        if self.latents is not None:
            bins = self.latents
            lines += [
                f"decoder norms: {bins['base']} base alone, {bins['shared']} shared, {bins['tuned']} tuned alone, "
                f"{bins['between']} between",
                f"  {bins['tuned_confirmed']} of the tuned model's are not needed by the base (latent scaling)",
            ]
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "site": str(self.site),
            "pairing": self.dictionary.pairing.to_json(),
            "d_in": self.dictionary.d_in,
            "d_dict": self.dictionary.d_dict,
            **self.quality.to_json(),
            **({} if self.latents is None else {"latents": self.latents}),
        }

    def save(self, folder: Path | str) -> Path:
        """Write the numbers and the summary into `folder`."""
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_json("quality.json", self.to_dict())
        return run.write_text("summary.txt", self.summary() + "\n")

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


def evaluate(
    source: Dictionary | Path | str,
    store: ActivationStore | Path | str,
    *,
    base: Models | None = None,
    tuned: str | Path | None = None,
    traffic: Texts | None = None,
    rows: int = 200,
    max_tokens: int = 512,
    tokens: int = 200_000,
    site: Site | None = None,
    pairing: Kind | None = None,
    k: int | None = None,
    adapter: bool | None = None,
    device: str = "cpu",
    seed: int = 0,
    track: Track = silent,
) -> QualityResult:
    """Measure a dictionary on a store of other traffic than the one it was trained on.

    Args:
        source: a dictionary, or its folder.
        store: a store that `harvest` made, or its folder.
        base: the base's folder or hub id, or a loaded pair, to measure the loss recovered.
        tuned: the fine-tune or its adapter, likewise.
        traffic: texts that are run through the models; bundled benign prompts without any.
        rows: greatest number of texts.
        max_tokens: longer texts are cut to this many tokens.
        tokens: greatest number of tokens of the store that are read.
        site: where the dictionary belongs; by default where its files say.
        pairing: what it reads, where its files do not say; not for a crosscoder.
        k: number of latents that fire, where the files of Qwen Scope do not say it.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where to run.
        seed: seed of the order of tokens and of the bundled prompts.
        track: shows progress.

    Raises:
        UsageError: an option does not fit the dictionary or the store, or the models are not those of the store.

    Example:
        >>> from molehunt.workflows.dictionary_quality import evaluate
        >>> print(evaluate("dictionaries/NAME", "other-store").summary())  # doctest: +SKIP
    """
    opened = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
    loaded = source if isinstance(source, Dictionary) else load_dictionary(source, d_model=opened.d_model, k=k)
    found = _paired(loaded.to(device), pairing)
    place = _site(found, site, opened)
    chosen = _chosen_batches(opened, place, found, tokens, seed)
    models, ids = None, list[list[int]]()
    if base is not None:
        texts = benign_prompts(rows, seed=seed) if traffic is None else examples(traffic, rows)
        models = open_models(base, tuned, adapter=adapter, device=device, track=track)
        _refuse_others(models, opened)
        ids = token_rows(models.pair, texts, max_tokens)
    measured = measure_quality(
        found, chosen(), pair=None if models is None else models.pair, rows=ids, site=place, track=track
    )
    latents = _latents(found, chosen, track) if found.pairing.kind == "both" else None
    return QualityResult(site=place, dictionary=found, quality=measured, latents=latents)


def _paired(found: Dictionary, pairing: Kind | None) -> Dictionary:
    if pairing is None:
        return found
    if found.pairing.kind == "both":
        raise UsageError("This dictionary is a crosscoder; --pairing is for other ones.")
    return replace(found, pairing=Pairing(kind=pairing))


def _site(found: Dictionary, site: Site | None, store: ActivationStore) -> Site:
    place = site or found.site
    if place is None:
        raise UsageError(f"The dictionary does not say its site. Give --site: {', '.join(map(str, store.sites))}.")
    refuse_unharvested(place, store)
    return place


def _chosen_batches(
    store: ActivationStore, site: Site, found: Dictionary, tokens: int, seed: int
) -> Callable[[], Iterator[PairBatch]]:
    """A function that starts again with the same tokens, each at most once."""
    differences = store.manifest.delta_int8
    if differences and found.pairing.kind != "difference":
        raise UsageError(
            f"This store holds differences alone (--delta-int8), and the dictionary reads {found.pairing.kind}."
        )
    size = min(EVAL_BATCH, tokens)
    return lambda: islice(
        batches(store, site, size=size, seed=seed, buffer_tokens=BUFFER_TOKENS, epochs=1, delta_only=differences),
        -(-tokens // size),
    )


def _refuse_others(models: OpenedModels, store: ActivationStore) -> None:
    """Raises UsageError unless the store was harvested from these models."""
    names = identify(*models.checkpoints, models.pair.tokenizer)
    check_expected(store.path, store.manifest, Expected(base=names.base, tuned=names.tuned, tokenizer=names.tokenizer))


def _latents(found: Dictionary, chosen: Callable[[], Iterator[PairBatch]], track: Track) -> dict[str, int]:
    """How many latents of a crosscoder belong to which model, by decoder norm and by latent scaling."""
    relative = relative_norms(found)
    alone = (relative > OWN_LATENT) & latent_scaling(found, chosen(), track=track).tuned_only()
    return {**norm_bins(relative), "tuned_confirmed": int(torch.count_nonzero(alone))}


def _loss_lines(loss: SplicedLoss) -> list[str]:
    recovered = "nothing to recover: the mean costs nothing" if loss.recovered is None else f"{loss.recovered:.1%}"
    predictions = (
        "nothing to recover: the mean changes nothing" if loss.kl_recovered is None else f"{loss.kl_recovered:.1%}"
    )
    return [
        f"loss recovered          {recovered}, on {loss.n} tokens",
        f"predictions recovered   {predictions}",
        f"  KL, nats a token: {loss.kl_spliced:.4f} spliced, {loss.kl_reference:.4f} with the mean",
        f"  nats a token: {loss.clean:.4f} as it is, {loss.spliced:.4f} spliced, {loss.reference:.4f} with the mean",
    ]
