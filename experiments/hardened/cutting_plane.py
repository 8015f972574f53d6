"""Edits behind the attacked site, grown against perturbations that know them: what a perturbation does to a later block is taken out there.

A perturbation that enters after a fix meets no edit at its own site, but it has to act through what comes behind. Each round is a
cutting plane: attack, take the leading directions of what the perturbations move at each later site, ablate those too, attack anew.
Taken out of every token, directions cost clean answers more from round to round; `HalfSpaceGate` is a gate for them that a perturbed
token opens and a clean one does not. An attacker who knows it has to stay inside (`error_monitor.Observed`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from experiments.hardened.threat import displacement
from molehunt.contracts import Intervention
from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.steer.ablate import Ablate, orthonormal
from molehunt.stress.attacks.attack import AttackConfig
from molehunt.stress.attacks.constraint import Free
from molehunt.stress.attacks.objective import TargetText
from molehunt.stress.attacks.shortest import shortest_attack
from molehunt.stress.attacks.suffix import suffix_of

RIDGE = 0.02
"""On the clean covariance, of its mean variance: what a half-space gate's direction may lean on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingRows:
    """The rows that defences grow from, and how hard they are attacked."""

    model: nn.Module
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    """What each perturbation is to make the model say, token ids."""
    site: Site
    """Where perturbations enter, after the edits there."""
    max_norm: float
    """The longest perturbation, as an activation's length is measured."""
    config: AttackConfig
    levels: int = 5


def cutting_plane_ablations(
    rows: TrainingRows,
    fixed: Sequence[Intervention],
    centers: Mapping[Site, Float[Tensor, " d_model"]],
    *,
    rounds: int,
    add: int = 2,
) -> list[tuple[Ablate, ...]]:
    """Ablations at later sites, one set for each round of attacks; the last is the largest.

    Ends early where no perturbation brings a row back any more.

    Args:
        rows: none of them may judge the result.
        fixed: edits that stay as they are.
        centers: of each site above the attacked one, the clean mean.
        rounds: of growth.
        add: directions that a round adds at each site.
    """
    directions: dict[Site, Tensor] = {}
    done: list[tuple[Ablate, ...]] = []
    for _ in range(rounds):
        edits = [*fixed, *_ablations(directions, centers)]
        suffix = suffix_of(rows.model, rows.prompts, rows.site, defence=edits, answers=rows.answers)
        goal = TargetText.of([list(answer) for answer in rows.answers])
        radius = torch.full((len(rows.prompts),), rows.max_norm)
        found = shortest_attack(suffix, goal, Free(), radius, rows.config, levels=rows.levels)
        if not bool(found.recovered.any()):
            break
        for site in centers:
            moved = displacement(suffix, site, found.delta)[found.recovered, 0]
            directions[site] = with_leading(directions.get(site), moved, add)
        done.append(_ablations(directions, centers))
    return done


def with_leading(
    held: Float[Tensor, "k d_model"] | None, moved: Float[Tensor, "rows d_model"], add: int
) -> Float[Tensor, "more d_model"]:
    """Orthonormal directions, and with them the leading ones of what moves outside of their span, each row at length 1."""
    free = moved.double()
    if held is not None:
        free = free - free @ held.double().mT @ held.double()
    leading = torch.linalg.svd(normalize(free, dim=-1), full_matrices=False).Vh[:add].float()
    return leading if held is None else orthonormal(torch.cat([held, leading]))


def _ablations(directions: Mapping[Site, Tensor], centers: Mapping[Site, Tensor]) -> tuple[Ablate, ...]:
    return tuple(Ablate(site, held, center=centers[site]) for site, held in directions.items())


@dataclass(frozen=True, eq=False)
class HalfSpaceGate:
    """Half-spaces that hold clean activations of a site: a gate, open for tokens outside of any.

    Read as a monitor (`z`, `threshold`), an attacker is held inside of it.
    """

    site: Site
    directions: Float[Tensor, "k d_model"]
    bounds: Float[Tensor, " k"]
    scales: Float[Tensor, " k"]
    """Standard deviation of clean projections."""
    threshold: float = 0.0

    def z(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
        """By how many standard deviations a token is outside; below 0 inside. Differentiable."""
        over = (acts.float() @ self.directions.to(acts.device).mT - self.bounds.to(acts.device)) / self.scales
        return over.amax(-1)

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """True where a token is outside."""
        return self.z(acts) > self.threshold

    def narrowed(
        self, clean: Float[Tensor, "tokens d_model"], perturbed: Float[Tensor, "rows d_model"]
    ) -> "HalfSpaceGate":
        """One more half-space, that holds every clean token, across what tells perturbed ones from them (Fisher's direction)."""
        one = half_space_gate(self.site, clean, perturbed)
        return replace(
            self,
            directions=torch.cat([self.directions, one.directions]),
            bounds=torch.cat([self.bounds, one.bounds]),
            scales=torch.cat([self.scales, one.scales]),
        )


def half_space_gate(
    site: Site, clean: Float[Tensor, "tokens d_model"], perturbed: Float[Tensor, "rows d_model"]
) -> HalfSpaceGate:
    """The first half-space of a half-space gate. Raises NotTestable for no more clean tokens than dimensions, or no perturbed row."""
    if len(clean) <= clean.shape[1] or not len(perturbed):
        raise NotTestable(
            f"a half-space gate stands between more clean tokens than dimensions and a perturbed one or more; got {len(clean)} and "
            f"{len(perturbed)}."
        )
    spread = torch.cov(clean.double().mT)
    spread += RIDGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    apart = perturbed.double().mean(0) - clean.double().mean(0)
    direction = normalize(torch.linalg.solve(spread, apart), dim=0).float()[None]
    projected = clean @ direction[0]
    return HalfSpaceGate(site, direction, projected.max()[None], projected.std()[None])
