"""Which part of a perturbation brings the behaviour back: what the dictionary's latents write, or what it cannot say.

Source: arXiv 2606.18322 §3 and its path replay, where the reconstruction residual alone did it. That residual had 2.1
times the norm of δ, since what the latents write and what the reconstruction misses nearly cancel. So every part is also
replayed at δ's own length, and taken out of δ with the rest at that length.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import UsageError, printable
from molehunt.measure.interval import Interval, proportion
from molehunt.steer.clamp import check_latents, written
from molehunt.stress.attacks.attack import ForwardPass
from molehunt.stress.attacks.constraint import orthonormal
from molehunt.stress.attacks.objective import Objective

NOTHING = 1e-5
"""A part below this share of δ's length is rounding, and is never lengthened."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Replay:
    """What a vector does to each row in the place of δ."""

    margin: Float[Tensor, " batch"]
    """Above 0 where the behaviour is back."""
    norm: Float[Tensor, " batch"]
    """In units of ‖δ‖, both over all positions."""

    @property
    def recovered(self) -> Interval:
        """Share of rows that are back, with exact limits."""
        return proportion(int((self.margin > 0).sum()), len(self.margin))


@dataclass(frozen=True, eq=False, kw_only=True)
class Component:
    """One part of δ, alone and taken out."""

    alone: Replay
    alone_at_norm: Replay
    """Scaled to ‖δ‖. Rows without this part (see `absent`) keep nothing: their norm is 0."""
    without: Replay
    """δ minus the part."""
    without_at_norm: Replay
    """The same scaled to ‖δ‖; nothing where the part is all of δ."""

    @property
    def absent(self) -> int:
        """Rows of which this is no part, but for rounding."""
        return int((self.alone.norm <= NOTHING).sum())


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution:
    """Every part of a batch of perturbations."""

    nothing: Replay
    """δ = 0, measured."""
    whole: Replay
    """δ, measured in the same way as its parts."""
    components: Mapping[str, Component]
    """By the names of `components`."""


@torch.no_grad()
def components(
    dictionary: Dictionary,
    latents: Int[Tensor, " latents"],
    defended: Float[Tensor, "_ _ _"],
    delta: Float[Tensor, "batch positions d_model"],
    *,
    k: int = 16,
) -> dict[str, Float[Tensor, "batch positions d_model"]]:
    """What δ consists of, seen through a dictionary, in units of the activations.

    Args:
        dictionary: of the attacked site, of any family.
        latents: S, those that are clamped.
        defended: activations there under the defence.
        delta: what was added to them.
        k: how many latents `top` holds.

    Returns:
        `clamped` and `non-clamped`: by how much what these latents write changed. `normalisation`, of dictionaries that
        normalise their input: by how much its scale and mean moved the rest of the decoder's output. `residual`: what
        the reconstruction misses of δ, δ − (D(E(h + δ)) − D(E(h))). Together they are δ. `top`, a part of `non-clamped`:
        the k latents of each row whose codes changed most, over all positions.

    Raises:
        UsageError: the latents, the shapes or k do not fit, or a row has no perturbation.

    Source: arXiv 2606.18322, appendix (path decomposition).
    """
    check_latents(dictionary, latents)
    _check(delta, defended)
    if k < 1:
        raise UsageError(f"`top` holds one latent or more, got k = {k}.")
    dictionary, latents = dictionary.to(delta.device), latents.to(delta.device)
    rows = [  # one at a time: the codes of all latents are wide
        _of_row(dictionary, latents, x.float(), d.float(), k) for x, d in zip(defended, delta, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _of_row(dictionary: Dictionary, latents: Tensor, x: Tensor, delta: Tensor, k: int) -> dict[str, Tensor]:
    pushed = x + delta
    before, after = dictionary.encode(x), dictionary.encode(pushed)
    empty = torch.zeros_like(before)
    bare, bare_pushed = dictionary.decode(empty, x), dictionary.decode(empty, pushed)

    def change(some: Tensor) -> Tensor:
        return written(dictionary, some, after[:, some], pushed) - written(dictionary, some, before[:, some], x)

    moved = (after - before).norm(dim=0).index_fill(0, latents, -1.0)
    top = moved.topk(min(k, dictionary.d_dict - len(latents))).indices
    others, others_before = after.index_fill(1, latents, 0.0), before.index_fill(1, latents, 0.0)
    parts = {
        "clamped": change(latents),
        "non-clamped": dictionary.decode(others, pushed) - bare_pushed - (dictionary.decode(others_before, x) - bare),
    }
    if dictionary.norm != "none":
        parts["normalisation"] = bare_pushed - bare
    parts["residual"] = delta - torch.stack([*parts.values()]).sum(0)
    return {**parts, "top": change(top) if len(top) else torch.zeros_like(delta)}


@torch.no_grad()
def attribute(
    runs: ForwardPass,
    objective: Objective,
    delta: Float[Tensor, "batch positions d_model"],
    dictionary: Dictionary,
    latents: Int[Tensor, " latents"],
    *,
    k: int = 16,
) -> Attribution:
    """Replay every part of δ, and δ without it, at its own norm and at δ's.

    Args:
        runs: what δ was found in; give the rows that it recovered.
        objective: what it was for.
        delta: as it is added from the anchor on.
        dictionary: of the attacked site.
        latents: S, those that are clamped.
        k: see `components`.

    Raises:
        UsageError: see `components`.
    """
    parts = components(dictionary, latents, runs.entering[:, : delta.shape[1]], delta, k=k)
    length = delta.flatten(1).norm(dim=1)

    def replay(vector: Tensor) -> Replay:
        pushed = runs.entering.clone()
        pushed[:, : vector.shape[1]] += vector
        margin = objective(runs(pushed)).margin.float()
        return Replay(margin=margin, norm=vector.flatten(1).norm(dim=1) / length)

    def at_norm(vector: Tensor) -> Tensor:
        own = vector.flatten(1).norm(dim=1)
        size = torch.where(own > NOTHING * length, length / own, torch.zeros_like(own))
        return vector * size[:, None, None]

    return Attribution(
        nothing=replay(torch.zeros_like(delta)),
        whole=replay(delta),
        components={
            name: Component(
                alone=replay(part),
                alone_at_norm=replay(at_norm(part)),
                without=replay(delta - part),
                without_at_norm=replay(at_norm(delta - part)),
            )
            for name, part in parts.items()
        },
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Geometry:
    """Where the perturbations of a batch point."""

    cosines: Mapping[str, Float[Tensor, "batch positions"]]
    """Cosine with each given direction, position by position; 0 where a position is not perturbed."""
    in_span: Float[Tensor, " batch"]
    """Share of ‖δ‖ inside the span of the clamped latents' encoder columns."""
    shares: Float[Tensor, " rank"]
    """Shares of Σ‖δ‖² over rows in each singular vector of the rows, largest first: 1 in the first where all rows are alike."""
    chance: Float[Tensor, " rank"]
    """The same of random rows, each as long as its own."""

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of `shares`: 1 where one vector does for all rows. Source: Roy and Vetterli (2007)."""
        return float(torch.special.entr(self.shares).sum().exp())


@torch.no_grad()
def geometry(
    delta: Float[Tensor, "batch positions d_model"],
    dictionary: Dictionary,
    latents: Int[Tensor, " latents"],
    directions: Mapping[str, Float[Tensor, " _"]],
    *,
    seed: int = 0,
) -> Geometry:
    """Compare perturbations with known directions, with the clamped latents and with each other.

    Args:
        delta: of each row.
        dictionary: of the attacked site.
        latents: S, those that are clamped.
        directions: of length 1, such as the refusal direction, by name.
        seed: of the random rows.

    Raises:
        UsageError: a direction is not of length 1 or of another width, the latents are none, or a row is 0.
    """
    check_latents(dictionary, latents)
    _check(delta, delta)
    width = delta.shape[-1]
    if dictionary.d_in != width:
        raise UsageError(f"this dictionary reads {dictionary.d_in} values a token, and δ has {width}.")
    for name, direction in directions.items():
        if direction.shape != (width,) or not abs(float(direction.norm()) - 1) <= 1e-3:
            raise UsageError(
                f"a direction has length 1 and {width} entries; {printable(name)} has length {float(direction.norm()):.4g} "
                f"and {len(direction)}."
            )
    rows = delta.double().cpu()
    length = rows.norm(dim=-1).clamp_min(1e-30)
    basis = orthonormal(dictionary.W_enc[:, latents.to(dictionary.W_enc.device)].double().cpu())
    flat = rows.flatten(1)
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    noise *= (flat.norm(dim=1) / noise.norm(dim=1))[:, None]
    return Geometry(
        cosines={name: (rows @ one.double().cpu() / length).float() for name, one in directions.items()},
        in_span=((rows @ basis).flatten(1).norm(dim=1) / flat.norm(dim=1)).float(),
        shares=_shares(flat),
        chance=_shares(noise),
    )


def _shares(rows: Tensor) -> Tensor:
    energy = torch.linalg.svdvals(rows).square()
    return (energy / energy.sum()).float()


def _check(delta: Tensor, defended: Tensor) -> None:
    if not len(delta) or delta.shape != defended.shape:
        raise UsageError(f"δ is {list(delta.shape)}, and the activations it is added to are {list(defended.shape)}.")
    length = delta.flatten(1).norm(dim=1)
    nothing = [i for i, one in enumerate(length.tolist()) if not 0 < one < float("inf")]
    if nothing:
        raise UsageError(
            f"row {nothing[0]} has a perturbation of length {float(length[nothing[0]]):.4g} ({len(nothing)} rows are so), "
            "which has no parts.\nGive the rows that an attack recovered."
        )
