"""Steer along a direction that something else found: a weight difference, or a latent of a dictionary."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.weight_comparison import WRITERS
from molehunt.audit.weights import compare_weights
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.detect import load_dictionary
from molehunt.errors import NotTestable, UsageError
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, counting, silent
from molehunt.site import Site
from molehunt.steer.contrast import last_token_acts
from molehunt.steer.directional_vectors import latent_vector, weight_vector
from molehunt.steer.vector import VectorFacts
from molehunt.traffic.chat import Text
from molehunt.workflows import inputs
from molehunt.workflows.inputs import Texts
from molehunt.workflows.models import Models, open_models, open_pair
from molehunt.workflows.steer import SteerResult

DIRECTIONS = 8
"""Number of singular directions of each changed matrix that are computed."""
BATCH = 32
"""Prompts that are read at a time for a dictionary."""


def steer_along_weights(
    base: Models,
    tuned: str | Path | None = None,
    *,
    positive: Texts,
    negative: Texts,
    layer: int,
    rank: int = 0,
    strength: float = -1.0,
    limit: int = 1000,
    adapter: bool | None = None,
    device: str = "cpu",
    seed: int = 0,
    track: Track = silent,
) -> SteerResult:
    """Fit a vector along a weight direction of one block, as long as the shift between two lists of prompts along it.

    Of the matrices of the block that write to the residual stream, the one is taken whose change is furthest from a random
    change of its size.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        positive: prompts that trigger the behaviour.
        negative: prompts that do not trigger it.
        layer: 0-based block whose weight difference gives the direction, and whose output is steered.
        rank: number of the direction in that matrix; 0 is the strongest.
        strength: multiple of the vector's length with which the result steers.
        limit: greatest number of rows that are read of each list.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        seed: seed of the randomised singular value decomposition.
        track: shows progress.

    Raises:
        NotTestable: no matrix of this block has a direction above its rounding noise, or the prompts do not differ along it.
        UsageError: the matrix has fewer directions, or the pair was made from models in memory.

    Example:
        >>> from molehunt.workflows.steer_along import steer_along_weights
        >>> fitted = steer_along_weights(pair, positive=triggered, negative=clean, layer=3)  # doctest: +SKIP
    """
    opened = open_models(base, tuned, adapter=adapter, device=device, track=track)
    pair, site = opened.pair, Site(layer)
    compared = compare_weights(*opened.checkpoints, k=DIRECTIONS, seed=seed, track=track)
    rows = [row for row in compared.matrices if row.layer == layer and row.role in WRITERS and row.strengths]
    strongest = max(rows, key=lambda row: row.z or 0.0, default=None)
    if strongest is None or strongest.directions is None:
        raise NotTestable(
            f"no matrix of block {layer} that writes to the residual stream changed above its rounding noise; "
            "`molehunt directions` lists the blocks that did."
        )
    shown, harmless = (
        last_token_acts(pair, inputs.prompts(texts, limit), [site], track=track)[site] for texts in (positive, negative)
    )
    vector = weight_vector(
        strongest.directions, layer, shown, harmless, rank=rank, facts=_facts(pair, opened.tuned_hash)
    )
    return SteerResult(pair=pair, vector=vector, strength=strength, operator="add", scope="all")


def steer_along_latent(
    base: Models,
    tuned: str | Path | None = None,
    *,
    dictionary: Dictionary | str | Path,
    latent: int,
    positive: Texts,
    negative: Texts,
    layer: int | None = None,
    strength: float = -1.0,
    limit: int = 1000,
    adapter: bool | None = None,
    device: str = "cpu",
    track: Track = silent,
) -> SteerResult:
    """Fit a vector along what one latent of a dictionary writes more on the first list of prompts than on the second.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        dictionary: a dictionary of the block's output, or its folder.
        latent: number of the latent.
        positive: prompts that trigger the behaviour.
        negative: prompts that do not trigger it.
        layer: 0-based block; needed where the dictionary does not name its site.
        strength: multiple of the vector's length with which the result steers.
        limit: greatest number of rows that are read of each list.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        track: shows progress.

    Raises:
        UsageError: no such latent, or the block is not known, or the dictionary is of another site.
        NotTestable: the latent writes as much on both lists.

    Example:
        >>> from molehunt.workflows.steer_along import steer_along_latent
        >>> fitted = steer_along_latent(pair, dictionary="SAE", latent=12, positive=bad, negative=good)  # doctest: +SKIP
    """
    pair, model_hash = open_pair(base, tuned, adapter=adapter, device=device, track=track)
    found = (
        dictionary if isinstance(dictionary, Dictionary) else load_dictionary(Path(dictionary), d_model=pair.d_model)
    )
    site = found.site if layer is None else Site(layer)
    if site is None:
        raise UsageError("this dictionary does not say where its activations come from; give layer.")
    shown, harmless = (
        _dictionary_inputs(pair, found, site, inputs.prompts(texts, limit), track) for texts in (positive, negative)
    )
    vector = latent_vector(found, latent, site.layer, shown, harmless, facts=_facts(pair, model_hash))
    return SteerResult(pair=pair, vector=vector, strength=strength, operator="add", scope="all")


def _facts(pair: ModelPair, model_hash: str | None) -> VectorFacts:
    return VectorFacts(method="", model=model_hash, n_layers=pair.n_layers, d_model=pair.d_model)


def _dictionary_inputs(
    pair: ModelPair, dictionary: Dictionary, site: Site, prompts: Sequence[Text], track: Track
) -> Float[Tensor, "prompts d_in"]:
    """What the dictionary reads at each prompt's last token."""
    parts: list[Tensor] = []
    with counting(track, "reading prompts", len(prompts)) as done:
        for start in range(0, len(prompts), BATCH):
            reading = pair.read(prompts[start : start + BATCH], sites=[site])
            rows = torch.arange(len(reading.decision), device=reading.decision.device)
            base, tuned = (acts[site][rows, reading.decision].float().cpu() for acts in (reading.base, reading.tuned))
            parts.append(dictionary.pairing.input(base, tuned))
            done(len(rows))
    return torch.cat(parts)
