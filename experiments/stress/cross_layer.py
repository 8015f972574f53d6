"""Attacks on clamps at several layers: a perturbation after the lowest one, and one more after each later one.

What is added low changes what later clamps read. Published (arXiv 2606.18322 §3): the gradient loses the rows of a
Jacobian, which its code samples with nine probes of 960 rows, and a penalty does the rest. Exact: at each later clamped
site, whatever moved the clamped latents' pre-activations is put back inside the graph, and counts in the norm.

The layers lie behind each other along the axis of positions, so that `attack` and `shortest_attack` run as they are.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.dictionary.nonlinearity import only
from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.stress.attacks.attack import TINY
from molehunt.stress.attacks.constraint import RIDGE, Exact, outside
from molehunt.stress.attacks.suffix import Suffix
from molehunt.stress.defences.watched import WatchedLatents
from molehunt.stress.evaluation.drift import WatchedDrift, drift_of

PROBES = 8
"""Random ones; the drift itself is one more."""
DRIFT_WEIGHT = 200.0
"""λ_act of the published runs, on the squared relative drift."""


Add = Callable[[int, Float[Tensor, "batch positions d_model"]], Float[Tensor, "batch positions d_model"]]


class _Reached(BaseException):
    """Unwinds a pass once the last clamped site was edited. Never leaves `Layered`."""


class _Put:
    """What an attack adds at the first positions of one site, after the clamp there."""

    def __init__(self, site: Site, positions: int, add: Callable[[Tensor], Tensor], *, last: bool) -> None:
        self.site = site
        self._positions, self._add, self._last = positions, add, last

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        here = acts[:, : self._positions].float()
        pushed = torch.cat([(here + self._add(here)).to(acts.dtype), acts[:, self._positions :]], 1)
        self.left = pushed.float()
        if self._last:
            raise _Reached
        return pushed


@dataclass(frozen=True, eq=False, kw_only=True)
class Layered:
    """A suffix that is entered at several sites. Slot k · positions + p is position p of the k-th site, lowest first:
    an attack on it takes `AttackConfig(positions=layered.slots)`, and its norm is over all layers.
    """

    suffix: Suffix
    """Entered at the lowest site; its defence holds every clamp."""
    held: Mapping[Site, Exact]
    """The clamped latents of each site, lowest first."""
    positions: int
    """From the anchor on, that may be perturbed at each site."""
    reference: tuple[Float[Tensor, "batch pos d_model"], ...]
    """What leaves each site in the defended, unattacked run, from the anchor on."""

    @property
    def slots(self) -> int:
        return len(self.held) * self.positions

    @property
    def real(self) -> Bool[Tensor, "batch positions"]:
        """Perturbed positions that are no padding."""
        return self.suffix.answered[:, : self.positions]

    @cached_property
    def entering(self) -> Float[Tensor, "batch entering d_model"]:
        """The defended activations of every slot, then what is not perturbed at the lowest site."""
        slots = [one[:, : self.positions] for one in self.reference]
        return torch.cat([*slots, self.reference[0][:, self.positions :]], 1)

    def __call__(self, entering: Float[Tensor, "batch entering d_model"]) -> Float[Tensor, "batch pos vocab"]:
        """Logits, what differs from the defended activations being added at each site."""
        slots, n = self.slots, self.positions
        parts = [*self.by_site(entering[:, :slots] - self.entering[:, :slots]).values()]
        lowest = torch.cat([entering[:, :n], entering[:, slots:]], 1)
        return self._entered(self._edits(lambda k, here: parts[k], stop=False))(lowest)

    def rows(self, kept: Int[Tensor, " kept"]) -> "Layered":
        """Some rows of the batch, in this order."""
        return replace(self, suffix=self.suffix.rows(kept), reference=tuple(one[kept] for one in self.reference))

    def by_site(
        self, delta: Float[Tensor, "batch slots d_model"]
    ) -> dict[Site, Float[Tensor, "batch positions d_model"]]:
        """What is added at each site. Raises UsageError for another number of slots."""
        if delta.shape[1] != self.slots:
            raise UsageError(
                f"this attack has {self.slots} slots ({len(self.held)} sites of {self.positions} positions) and was given "
                f"{delta.shape[1]}; set `positions` of its AttackConfig to {self.slots}."
            )
        return dict(zip(self.held, delta.split(self.positions, 1), strict=True))

    def states(self, delta: Float[Tensor, "batch slots d_model"]) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
        """What leaves each site from the anchor on when δ is added. Differentiable."""
        parts = [*self.by_site(delta).values()]
        return self.climb(lambda k, here: parts[k])[1]

    def climb(
        self, add: Add
    ) -> tuple[Float[Tensor, "batch slots d_model"], dict[Site, Float[Tensor, "batch pos d_model"]]]:
        """Run from the lowest site to the highest, and no further.

        Args:
            add: called with the number of a site and the activations that arrive at its perturbed positions, after the clamp
                there; says what is added to them. Padding is left alone.

        Returns:
            What was added in each slot, and what leaves each site.
        """
        added: list[Tensor] = []

        def counted(k: int, here: Tensor) -> Tensor:
            added.append(add(k, here) * self.real[..., None])
            return added[-1]

        first, n = self.reference[0], self.positions
        lowest = torch.cat([first[:, :n] + counted(0, first[:, :n]), first[:, n:]], 1)
        edits = self._edits(counted, stop=True)
        if edits:
            with suppress(_Reached):
                self._entered(edits)(lowest)
        return torch.cat(added, 1), dict(zip(self.held, [lowest, *(edit.left for edit in edits)], strict=True))

    def _edits(self, add: Add, *, stop: bool) -> list[_Put]:
        later = list(self.held)[1:]
        return [
            _Put(site, self.positions, partial(add, k), last=stop and k == len(later))
            for k, site in enumerate(later, 1)
        ]

    def _entered(self, edits: list[_Put]) -> Suffix:
        """Those at one site act in their order: the clamp before what is added."""
        return replace(self.suffix, defence=(*self.suffix.defence, *edits))


@torch.no_grad()
def layered(suffix: Suffix, held: Mapping[Site, Exact], positions: int = 1) -> Layered:
    """Enter a suffix at every clamped site.

    Args:
        suffix: entered at the lowest of the sites, all clamps in its defence. Defences must treat each row by itself.
        held: the clamped latents of each site, which is the output of a block.
        positions: from the anchor on, perturbed and held at each site; those of the prompt before it are never reached.

    Raises:
        UsageError: no site, one that is no block output or below the suffix, a dictionary of another site, or more
            positions than there are.
    """
    if not held or min(held) != suffix.site:
        raise UsageError(
            f"the suffix is entered at {suffix.site} and the clamped sites are {', '.join(map(str, sorted(held))) or 'none'};"
            " enter it at the lowest of them."
        )
    for site, exact in held.items():
        if site.stream != "resid":
            raise UsageError(f"an attack enters at block outputs, and {site} is none.")
        if exact.dictionary.site not in (None, site):
            raise UsageError(f"this dictionary is of {exact.dictionary.site} and cannot be watched at {site}.")
    if not 1 <= positions <= suffix.tokens.shape[1]:
        raise UsageError(
            f"{positions} positions cannot be perturbed where {suffix.tokens.shape[1]} follow from the anchor on."
        )
    rising = dict(sorted(held.items()))
    bare = Layered(
        suffix=suffix, held=rising, positions=positions, reference=(suffix.entering,) * len(rising)
    )  # its reference above the lowest site is not read here
    _, left = bare.climb(lambda k, here: torch.zeros_like(here))
    return replace(bare, reference=tuple(left.values()))


@dataclass(frozen=True, eq=False)
class LayeredExact:
    """δ outside the clamped latents' encoder columns at every site, plus what puts the pre-activations of the clamped
    latents back to the defended run's: h ← h + QQᵀ(h_ref − h), which is h + Q R⁻ᵀ(p_ref − p(h)).

    Dictionaries that normalise their input get back the length of the rest of h, too.
    """

    name: ClassVar[str] = "exact"
    runs: Layered

    def rows(self, kept: Int[Tensor, " kept"]) -> "LayeredExact":
        return LayeredExact(self.runs.rows(kept))

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return gradient

    def __call__(
        self, delta: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        parts = [*self.runs.by_site(delta).values()]
        held, n = [*self.runs.held.values()], self.runs.positions

        def add(k: int, here: Tensor) -> Tensor:
            level = _levelled(held[k], here, self.runs.reference[k][:, :n]) if k else here
            return level - here + held[k](parts[k], level)

        added, _ = self.runs.climb(add)
        moved = (delta != 0).any(2).any(1)[:, None, None]
        return torch.where(moved, added, added - added.detach())  # what rounding moved is no perturbation

    def violation(
        self, acts: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        if all(only(one.dictionary.nonlinearity, one.latents) is not None for one in self.runs.held.values()):
            return acts.new_zeros(len(acts))
        n = self.runs.positions
        states = self.runs.states((acts - defended)[:, : self.runs.slots])
        lengths = [
            self.runs.held[site].violation(_kept(state, before, self.runs.real), before[:, :n])
            for (site, state), before in zip(states.items(), self.runs.reference, strict=True)
        ]
        return torch.stack(lengths).amax(0)


def _levelled(held: Exact, here: Tensor, before: Tensor) -> Tensor:
    """`here` with the pre-activations of `before`, and otherwise as it is."""
    Q = held.basis(here.device)
    if held.dictionary.norm == "none":
        return here + (before - here) @ Q @ Q.T
    own = outside(here, Q)
    length = outside(before, Q).norm(dim=-1, keepdim=True) / own.norm(dim=-1, keepdim=True).clamp_min(TINY)
    return own * length + before @ Q @ Q.T


def _kept(state: Tensor, before: Tensor, real: Tensor) -> Tensor:
    """Perturbed positions; padding as it was."""
    n = real.shape[1]
    return torch.where(real[..., None], state[:, :n], before[:, :n])


@dataclass
class _Sketch:
    """What the published constraint needs to know from step to step."""

    probes: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    delta: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayeredPaper:
    """The gradient without its part in a sketch of the Jacobian of all clamped pre-activations, and a penalty on their
    drift; Adam follows. The published 5 steps of correction after each step, and its choice among checkpoints by drift,
    are left out. Source: arXiv 2606.18322 §3, cross-layer, as its code has it.
    """

    name: ClassVar[str] = "paper"
    runs: Layered
    weight: float = DRIFT_WEIGHT
    _sketch: _Sketch = field(default_factory=_Sketch, repr=False)

    def rows(self, kept: Int[Tensor, " kept"]) -> "LayeredPaper":
        return replace(self, runs=self.runs.rows(kept))

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """At the perturbation of the last call."""
        assert self._sketch.delta is not None
        before = self._watched(dict(zip(self.runs.held, self.runs.reference, strict=True)))
        with torch.enable_grad():
            delta = self._sketch.delta.requires_grad_()
            moved = self._watched(self.runs.states(delta)) - before
            noise = torch.randn(PROBES, moved.shape[1], generator=self._sketch.probes).to(moved.device)
            probes = [*noise, moved.detach()]
            pulls = [torch.autograd.grad((probe * moved).sum(), delta, retain_graph=True)[0] for probe in probes]
        rows = torch.stack(pulls, 1).flatten(2)
        drift = 2 * rows[:, -1] / before.square().sum(1, keepdim=True).clamp_min(TINY)
        rows = rows / rows.norm(dim=2, keepdim=True).clamp_min(TINY)
        slope = gradient.flatten(1)
        inner = rows @ rows.mT + RIDGE * torch.eye(len(probes), device=rows.device)
        inside = torch.linalg.solve(inner, rows @ slope[..., None])
        return (slope - (rows.mT @ inside).squeeze(-1) + self.weight * drift).view_as(gradient)

    def _watched(self, states: Mapping[Site, Tensor]) -> Float[Tensor, "batch n"]:
        """Pre-activations of all clamped latents, at all perturbed positions; 0 at padding."""
        real = self.runs.real[..., None]
        found = [_latents(self.runs.held[site]).pre(state[:, : real.shape[1]]) * real for site, state in states.items()]
        return torch.cat([one.flatten(1) for one in found], 1)

    def __call__(
        self, delta: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        self._sketch.delta = delta.detach()
        return delta

    def violation(
        self, acts: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        return acts.new_zeros(len(acts))


def _latents(held: Exact) -> WatchedLatents:
    return WatchedLatents(held.dictionary, held.latents)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayeredDrift:
    """How far an attack moved the clamped latents of each site, and how much it added there."""

    perturbed: Mapping[Site, WatchedDrift]
    """Over the perturbed positions, the anchor among them."""
    pre: Mapping[Site, Float[Tensor, "batch pos"]]
    """‖Δ pre-activations‖ / ‖pre-activations‖ of every position from the anchor on, those after the perturbed ones, which
    they reach, too. 0 at padding.
    """
    norm: Mapping[Site, Float[Tensor, " batch"]]
    """Norm of what is added, corrections included; over sites it makes the norm of δ."""


@torch.no_grad()
def layered_drift(runs: Layered, delta: Float[Tensor, "batch slots d_model"]) -> LayeredDrift:
    """Measure what an attack on `runs` found: the drift where it acts, at all sites, as it runs.

    Raises:
        UsageError: another number of slots.
    """
    states, n = runs.states(delta), runs.positions
    before = dict(zip(runs.held, runs.reference, strict=True))
    real = runs.suffix.answered
    perturbed, pre = dict[Site, WatchedDrift](), dict[Site, Tensor]()
    for site, held in runs.held.items():
        watched, own = _latents(held), _kept(states[site], before[site], real)
        perturbed[site] = drift_of(watched, before[site][:, :n], own[:, :n])
        old, new = watched.pre(before[site]), watched.pre(own)
        pre[site] = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(TINY)
    norm = {site: part.flatten(1).norm(dim=1) for site, part in runs.by_site(delta).items()}
    return LayeredDrift(perturbed=perturbed, pre=pre, norm=norm)
