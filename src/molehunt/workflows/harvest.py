"""Harvest: both models' activations on the same tokens, stored on disk for dictionaries and maps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from molehunt.activation.harvest import SHARD_TOKENS
from molehunt.activation.harvest import harvest as harvested
from molehunt.activation.identity import identify
from molehunt.activation.manifest import MANIFEST, Manifest
from molehunt.activation.store import ActivationStore
from molehunt.errors import terminal_text
from molehunt.model.context import fitted, note_cuts
from molehunt.model.pair import ModelPair
from molehunt.run.folder import RunFolder
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.traffic.example import Example
from molehunt.traffic.world import benign_prompts
from molehunt.workflows.inputs import Texts, examples
from molehunt.workflows.models import Models, open_models
from molehunt.workflows.result import summary_html


@dataclass(frozen=True, eq=False, kw_only=True)
class HarvestResult:
    """A finished store of activations."""

    store: ActivationStore

    @property
    def manifest(self) -> Manifest:
        """All that is known of the store without reading a shard."""
        return self.store.manifest

    def summary(self) -> str:
        """How many tokens were stored, and how large the activations are at each site."""
        manifest = self.manifest
        form = "int8 differences" if manifest.delta_int8 else manifest.dtype
        lines = [
            f"HARVESTED {manifest.tokens} tokens of {manifest.documents} rows as {form}, in {len(manifest.shards)} files",
            f"{manifest.sinks} of them are attention sinks, left out of what follows and of training",
        ]
        lines += [
            f"{site}: RMS {sides['base'].rms:.4g} base, {sides['tuned'].rms:.4g} tuned, {sides['delta'].rms:.4g} their "
            "difference"
            for site, sides in manifest.scale.items()
        ]
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """Counts, width and the RMS of both models and of their difference at each site."""
        manifest = self.manifest
        return {
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "sinks": manifest.sinks,
            "shards": len(manifest.shards),
            "d_model": manifest.d_model,
            "rms": {site: {side: scale.rms for side, scale in sides.items()} for site, sides in manifest.scale.items()},
        }

    def save(self, folder: Path | str) -> Path:
        """Write the manifest and the summary into `folder`. The activations stay in the store."""
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_text(MANIFEST, self.manifest.to_json())
        return run.write_text("summary.txt", self.summary() + "\n")

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def harvest(
    base: Models,
    tuned: str | Path | None = None,
    *,
    sites: Sequence[Site],
    out: Path | str,
    traffic: Texts | None = None,
    rows: int = 10_000,
    max_tokens: int = 512,
    shard_tokens: int = SHARD_TOKENS,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    delta_int8: bool = False,
    adapter: bool | None = None,
    device: str = "cpu",
    seed: int = 0,
    track: Track = silent,
) -> HarvestResult:
    """Store both models' activations on the same tokens.

    Args:
        base: the base's folder or hub id, or a loaded pair.
        tuned: the folder or hub id of the fine-tune or its adapter.
        sites: where to read.
        out: folder of the store; a harvest that was interrupted there is resumed.
        traffic: texts; bundled benign prompts with answers without any.
        rows: greatest number of rows that are read.
        max_tokens: longer rows are cut to this many tokens.
        shard_tokens: greatest number of tokens in one file.
        dtype: the dtype in which activations are stored.
        delta_int8: store only the difference of the two, as int8.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        seed: seed of the bundled prompts.
        track: shows progress.

    Raises:
        MolehuntError: the models are no pair, a site or a text cannot be read, or `out` holds something else.

    Example:
        >>> from molehunt.workflows.harvest import harvest
        >>> harvest("BASE", "TUNED", sites=[Site(6)], out="store").to_dict()["tokens"]  # doctest: +SKIP
    """
    texts = benign_prompts(rows, seed=seed) if traffic is None else examples(traffic, rows)
    models = open_models(base, tuned, adapter=adapter, device=device, track=track)
    store = harvested(
        models.pair,
        token_rows(models.pair, texts, max_tokens),
        sites=sites,
        into=Path(out),
        identity=identify(*models.checkpoints, models.pair.tokenizer),
        dtype=dtype,
        delta_int8=delta_int8,
        shard_tokens=shard_tokens,
        track=track,
    )
    return HarvestResult(store=store)


def token_rows(pair: ModelPair, texts: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Token ids of conversation and response of each text, cut to `max_tokens`; how many were cut is logged."""
    context = replace(pair.context, tokens=min(max_tokens, pair.context.tokens))
    answers = [pair.tokenizer.encode(text.response or "", add_special_tokens=False, verbose=False) for text in texts]
    prompts = [
        fitted(pair.tokenizer, text.asked, context, room=len(answer))
        for text, answer in zip(texts, answers, strict=True)
    ]
    note_cuts(prompts, context, "texts")
    return [[*prompt.ids, *answer][: context.tokens] for prompt, answer in zip(prompts, answers, strict=True)]
