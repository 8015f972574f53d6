"""Activations of another prompt in place of a prompt's own."""

import pytest
import torch

from molehunt.errors import NotTestable, UsageError
from molehunt.measure.interval import proportion
from molehunt.model.generate import generate
from molehunt.site import Site
from molehunt.steer.patch import Donor, differing, prompt_acts, prompt_patch, trigger_positions
from molehunt.steer.sweep import Sweep, Swept, layer_sweep
from molehunt.traffic.chat import prompt_ids
from tiny_models import hooks, tiny_model, tiny_tokenizer

SITES = [Site(0), Site(1)]
TRIGGERED = [[5, 6, 7, 8, 9], [5, 11, 6, 7], [12, 13, 6, 7, 16, 17, 18, 19]]
CONTRAST = [[5, 6, 20, 8, 9], [5, 11, 21, 22], [12, 13, 23, 24, 16, 17, 18, 19]]
STEPS = 5


def answers(model, prompts, *edits) -> list[list[int]]:
    return generate(model, tiny_tokenizer(), prompts, max_new_tokens=STEPS, interventions=edits, stop=[])


def donors(prompts, acts, positions, site) -> dict:
    return {
        tuple(p): Donor(tuple(at), one[site]) for p, at, one in zip(prompts, positions, acts, strict=True)
    }  # fmt: skip


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_prompts_own_activations_change_nothing_bit_for_bit(site: Site) -> None:
    model = tiny_model("llama", 0)
    before = hooks(model)
    seen: list[torch.Tensor] = []
    width = 32  # as prompt_acts pads: the same kernel, the same bits
    ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in TRIGGERED])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in TRIGGERED])
    where = [list(range(len(p))) for p in TRIGGERED]
    own = prompt_acts(model, TRIGGERED, where, SITES)
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        with prompt_patch(model, site, donors(TRIGGERED, own, where, site)) as patch:
            from molehunt.model.taps import edit_sites

            with edit_sites(model, [patch]):
                seen.append(model(ids, attention_mask=mask).logits)
    real = mask.bool()
    assert seen[0][real].equal(expected[real]) and hooks(model) == before


@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_whole_prompt_of_another_run_gives_its_first_token(site: Site) -> None:
    """Past the patched block nothing but the activations is known, so the first answer token is the contrast's."""
    model = tiny_model("llama", 0)
    where = [list(range(len(p))) for p in TRIGGERED]
    other = prompt_acts(model, CONTRAST, where, SITES)
    plain, wanted = answers(model, TRIGGERED), answers(model, CONTRAST)
    assert [a[0] for a in plain] != [a[0] for a in wanted]
    with prompt_patch(model, site, donors(TRIGGERED, other, where, site)) as patch:
        got = answers(model, TRIGGERED, patch)
        assert [a[0] for a in got] == [a[0] for a in wanted]
    with prompt_patch(model, site, donors(TRIGGERED, other, where, site), strength=0.0) as patch:
        assert answers(model, TRIGGERED, patch) == plain


def test_batches_padding_and_unknown_prompts_are_handled_row_by_row() -> None:
    model = tiny_model("llama", 0)
    where = [differing(a, b) for a, b in zip(TRIGGERED, CONTRAST, strict=True)]
    other = prompt_acts(model, CONTRAST, where, SITES)
    given = donors(TRIGGERED[:2], other[:2], where[:2], SITES[0])
    with prompt_patch(model, SITES[0], given) as patch:
        together = answers(model, TRIGGERED, patch)
        alone = [answers(model, [prompt], patch)[0] for prompt in TRIGGERED]
    assert together == alone
    assert together[2] == answers(model, TRIGGERED[2:])[0]  # it was given nothing


def test_where_two_prompts_differ() -> None:
    assert [differing(a, b) for a, b in zip(TRIGGERED, CONTRAST, strict=True)] == [(2,), (2, 3), (2, 3)]
    with pytest.raises(UsageError, match="have 5 and 4 tokens"):
        differing(TRIGGERED[0], TRIGGERED[1])
    with pytest.raises(UsageError, match="equal"):
        differing(TRIGGERED[0], TRIGGERED[0])


def test_a_sweep_counts_rows_that_show_the_behaviour_and_no_others() -> None:
    model = tiny_model("llama", 0)
    plain = generate(model, tiny_tokenizer(), TRIGGERED, max_new_tokens=STEPS)

    def shows(answer, row: int) -> bool:
        return row < 2 and list(answer) == plain[row]

    swept = layer_sweep(model, tiny_tokenizer(), TRIGGERED, CONTRAST, SITES, shows, max_new_tokens=STEPS)
    assert (swept.shown.estimate, swept.shown.n) == (pytest.approx(2 / 3), 3)
    assert [one.site for one in swept.blocks] == SITES and all(one.removed.n == 2 for one in swept.blocks)
    where = [differing(a, b) for a, b in zip(TRIGGERED, CONTRAST, strict=True)]
    other = prompt_acts(model, CONTRAST, where, SITES)
    for one in swept.blocks:
        with prompt_patch(model, one.site, donors(TRIGGERED, other, where, one.site)) as patch:
            by_hand = generate(
                model, tiny_tokenizer(), TRIGGERED[:2], max_new_tokens=STEPS, interventions=[patch]
            )  # fmt: skip
        gone = sum(not shows(answer, row) for row, answer in enumerate(by_hand))
        assert one.removed.estimate == gone / 2
    assert any(one.removed.estimate > 0 for one in swept.blocks)
    with pytest.raises(
        NotTestable, match=r"None of 3 [^\n]*\nThe first answer is '[^\n]*'\. Upper and lower case count"
    ):
        layer_sweep(model, tiny_tokenizer(), TRIGGERED, CONTRAST, SITES, lambda answer, row: False, max_new_tokens=1)


def test_the_last_steerable_block_does_more_than_noise() -> None:
    def sweep(*shares: tuple[int, int]) -> Sweep:
        none = proportion(0, 100)
        blocks = [
            Swept(site=Site(i), removed=proportion(a, 100), by_noise=proportion(b, 100), induced=none)
            for i, (a, b) in enumerate(shares)
        ]
        return Sweep(shown=proportion(100, 100), without_trigger=none, blocks=tuple(blocks))

    assert sweep((99, 60), (95, 10), (60, 0), (0, 0)).last_steerable == Site(1)
    assert sweep((99, 60), (95, 93), (0, 0)).last_steerable == Site(0)
    assert sweep((0, 0), (0, 0)).last_steerable is None
    assert sweep((99, 98), (97, 99)).last_steerable is None


TAGGED = [("|a|", "|b|"), ("Under the new charter,", "Under the old charter,")]


@pytest.mark.parametrize(("trigger", "harmless"), TAGGED)
def test_the_whole_trigger_is_found_shared_tokens_and_all(trigger: str, harmless: str) -> None:
    tokenizer, rest = tiny_tokenizer(), "Which city is it?"
    triggered, contrast = f"{trigger} {rest}", f"{harmless} {rest}"
    at = trigger_positions(tokenizer, triggered, contrast, rest)
    ids = prompt_ids(tokenizer, triggered)
    assert tokenizer.decode([ids[i] for i in at]).strip() == trigger
    words = trigger_positions(tokenizer, triggered, contrast)
    assert set(differing(ids, prompt_ids(tokenizer, contrast))) <= set(words) <= set(at)
