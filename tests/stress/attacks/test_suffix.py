"""Suffix passes are full passes with the constant part left out."""

import pytest
import torch
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.model.blocks import decoder_blocks
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.suffix import suffix_of
from random_dictionaries import dictionary_of
from tiny_models import ARCHITECTURES, D_MODEL, hooks, prompts, tiny_model

SITE = Site(1)
ANSWERS = [[7, 9], [5], [], [11, 12, 13]]


def clamp(layer: int) -> Clamp:
    return Clamp(Site(layer), dictionary_of("jumprelu"), torch.tensor([3, 8]), "set", 2.0)


class _Added:
    """A vector put in at some tokens of one full pass."""

    def __init__(self, first: int, delta: Tensor) -> None:
        self.site, self._first, self._delta = SITE, first, delta

    def __call__(self, acts: Tensor) -> Tensor:
        acts = acts.clone()
        acts[:, self._first : self._first + len(self._delta)] += self._delta
        return acts


def full(model: nn.Module, row: list[int], edits: list[Intervention]) -> Tensor:
    """Logits of one unpadded row, everything run."""
    with edit_sites(model, edits):
        return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()


DEFENCES = {
    "none": [],
    "before": [clamp(0)],
    "here": [clamp(1)],
    "behind": [clamp(2)],
    "all": [clamp(0), clamp(1), clamp(2)],
}


@pytest.mark.parametrize("defence", DEFENCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_a_full_pass(architecture: str, defence: str) -> None:
    model, edits = tiny_model(architecture), DEFENCES[defence]
    rows = prompts()
    suffix = suffix_of(model, rows, SITE, defence=edits, answers=ANSWERS)
    delta = torch.randn(len(rows), 2, D_MODEL, generator=torch.Generator().manual_seed(1))
    perturbed = suffix.entering.clone()
    perturbed[:, :2] += delta
    for added, logits in (([], suffix(suffix.entering)), (delta, suffix(perturbed))):
        for i, (prompt, answer) in enumerate(zip(rows, ANSWERS, strict=True)):
            extra = [_Added(len(prompt) - 1, added[i][: 1 + len(answer)])] if len(added) else []
            expected = full(model, [*prompt, *answer], [*edits, *extra])[len(prompt) - 1 :]
            torch.testing.assert_close(logits[i, : 1 + len(answer)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_a_full_pass(architecture: str) -> None:
    model, edits = tiny_model(architecture), DEFENCES["all"]
    rows = prompts()
    suffix = suffix_of(model, rows, SITE, defence=edits)
    entering = suffix.entering.clone().requires_grad_()
    (found,) = torch.autograd.grad(suffix(entering)[:, 0, 5].sum(), entering)
    for i, prompt in enumerate(rows):
        delta = torch.zeros(1, D_MODEL, requires_grad=True)
        logits = full(model, prompt, [*edits, _Added(len(prompt) - 1, delta)])
        (expected,) = torch.autograd.grad(logits[-1, 5], delta)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)


def test_rows_are_those_of_the_whole_batch() -> None:
    suffix = suffix_of(tiny_model("llama"), prompts(), SITE, defence=DEFENCES["all"], answers=ANSWERS)
    whole = suffix(suffix.entering)
    kept = torch.tensor([2, 0])
    some = suffix.rows(kept)
    torch.testing.assert_close(some(some.entering), whole[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(suffix(suffix.entering), whole, rtol=0, atol=0)  # the whole is as it was


def test_prompts_of_one_token_have_no_prefix() -> None:
    model = tiny_model("llama")
    suffix = suffix_of(model, [[5], [9]], SITE)
    assert suffix.prefix is None
    torch.testing.assert_close(suffix(suffix.entering)[1], full(model, [9], []), rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    before = full(model, prompts()[1], [])
    suffix = suffix_of(model, prompts(), SITE)
    with pytest.raises(RuntimeError):
        suffix(suffix.entering[:, :, :5])
    assert hooks(model) == 0
    assert not any("forward" in block.__dict__ for block in decoder_blocks(model))
    torch.testing.assert_close(full(model, prompts()[1], []), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "answers", "site", "wrong"),
    [
        ([], None, SITE, "needs prompts"),
        ([[4], []], None, SITE, "needs prompts"),
        ([[4], [5]], [[6]], SITE, "2 prompts and 1 answers"),
        ([[4]], None, Site(1, "mlp"), "L1.mlp"),
    ],
)
def test_what_cannot_be_attacked(
    rows: list[list[int]], answers: list[list[int]] | None, site: Site, wrong: str
) -> None:
    with pytest.raises(UsageError, match=wrong):
        suffix_of(tiny_model("llama"), rows, site, answers=answers)
