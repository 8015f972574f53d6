"""Exact constraints keep the codes of the clamped latents; the published one leaks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molehunt.errors import UsageError
from molehunt.stress.attacks.constraint import Exact, Free, Paper, orthonormal
from random_dictionaries import FAMILIES, INPUT_NORMS, D, dictionary_of, some_acts

LATENTS = torch.tensor([17, 3, 8])


def noise(seed: int = 0, size: float = 3.0) -> Tensor:
    return size * torch.randn(3, 7, D, generator=torch.Generator().manual_seed(seed))


def share_in_span(delta: Tensor, columns: Tensor) -> float:
    """Of the norm, inside the span of the columns; by least squares, not by the basis that is tested."""
    flat = delta.reshape(-1, delta.shape[-1]).double()
    inside = columns.double() @ torch.linalg.lstsq(columns.double(), flat.T).solution
    return float(inside.norm() / flat.norm())


@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pre_activations_stay(family: str, center: bool, norm: str) -> None:
    dictionary = replace(dictionary_of(family), norm=norm, center=center)
    acts = some_acts()
    delta = Exact(dictionary, LATENTS)(noise(), acts)
    assert float(delta.norm(dim=-1).min()) > 0.5
    before, after = (dictionary.pre_activations(x, LATENTS) for x in (acts, acts + delta))
    assert float((after - before).norm() / before.norm()) <= 1e-5
    every_before, every_after = (dictionary.pre_activations(x) for x in (acts, acts + delta))
    assert float((every_after - every_before).norm() / every_before.norm()) > 0.1  # the others move


@pytest.mark.parametrize("family", FAMILIES)
def test_crossed_is_above_zero_where_other_latents_fire(family: str) -> None:
    dictionary, acts = dictionary_of(family), some_acts()
    exact = Exact(dictionary, LATENTS)
    seen = set[bool]()
    for seed in range(40):
        perturbed = acts + exact(noise(seed, 0.3), acts)
        fired, fires = (dictionary.encode_latents(x, LATENTS) > 0 for x in (acts, perturbed))
        changed = (fired != fires).any(-1).any(-1)
        assert ((exact.violation(perturbed, acts) > 0) == changed).all()
        seen |= set(changed.tolist())
    competing = family in ("topk", "group-max")
    assert seen == ({True, False} if competing else {False})


@pytest.mark.parametrize("family", ["topk", "group-max"])
def test_crossed_falls_along_its_gradient(family: str) -> None:
    dictionary, acts = dictionary_of(family), some_acts()
    exact = Exact(dictionary, LATENTS)
    delta = noise(2).requires_grad_()
    violation = exact.violation(acts + exact(delta, acts), acts)
    assert float(violation.detach().sum()) > 0
    (slope,) = torch.autograd.grad(violation.sum(), delta)
    after = exact.violation(acts + exact(delta.detach() - 0.01 * slope, acts), acts)
    assert float(after.sum()) < float(violation.detach().sum())


def test_dependent_columns_add_nothing() -> None:
    columns = torch.randn(D, 3, generator=torch.Generator().manual_seed(0)).double()
    doubled = torch.cat([columns, columns @ torch.randn(3, 4, dtype=torch.double), torch.zeros(D, 1)], 1)
    basis = orthonormal(doubled)
    assert basis.shape == (D, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.double))
    assert share_in_span(basis.T, columns) == pytest.approx(1, abs=1e-6)


def test_further_directions_are_kept_out() -> None:
    dictionary, acts = dictionary_of("relu"), some_acts()
    extra = torch.randn(D, 2, generator=torch.Generator().manual_seed(5))
    delta = Exact(dictionary, LATENTS, extra)(noise(), acts)
    assert share_in_span(delta, torch.cat([dictionary.W_enc[:, LATENTS], extra], 1)) < 1e-5


def test_the_published_projection_is_of_the_gradient_alone() -> None:
    dictionary, acts = dictionary_of("relu"), some_acts()
    paper, columns = Paper(dictionary, LATENTS), dictionary.W_enc[:, LATENTS]
    gradient = paper.gradient(noise())
    assert share_in_span(gradient, columns) < 1e-3  # a ridge leaves a little
    assert share_in_span(noise(), columns) > 0.1
    torch.testing.assert_close(paper(noise(), acts), noise(), rtol=0, atol=0)
    assert share_in_span(gradient.sign(), columns) > 0.05  # what Adam's first step makes of it


@pytest.mark.parametrize(
    "constraint", [Free(), Paper(dictionary_of("relu"), LATENTS), Exact(dictionary_of("relu"), LATENTS)]
)
def test_zero_stays_zero(constraint: Free | Paper | Exact) -> None:
    acts = some_acts()
    assert float(constraint(torch.zeros_like(acts), acts).abs().max()) == 0
    assert float(constraint.violation(acts, acts).max()) == 0


@pytest.mark.parametrize("latents", [[], [99], [1, 1]])
def test_latents_that_are_none(latents: list[int]) -> None:
    with pytest.raises(UsageError):
        Exact(dictionary_of("relu"), torch.tensor(latents, dtype=torch.long))
