"""Attacks through the prompt on a tiny model: the fix is live, and a random target stands beside each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks import discrete_suffix
from molehunt.stress.attacks.constraint import Exact, Free
from molehunt.stress.attacks.discrete_suffix import DiscreteConfig, discrete_start, discrete_suffixes
from molehunt.stress.attacks.insertion import insertion_of
from molehunt.stress.attacks.objective import TargetText
from molehunt.stress.attacks.soft_suffix import SoftConfig
from molehunt.stress.defences.defence import Defence
from molehunt.stress.defences.watched import WatchedLatents
from molehunt.stress.evaluation.arms import InputArm
from molehunt.stress.evaluation.attacked_rows import AttackedRows, attacked_rows
from molehunt.stress.evaluation.config import StressConfig
from molehunt.stress.evaluation.drift import drift_of
from molehunt.stress.evaluation.input_attacks import input_attacks
from molehunt.stress.evaluation.valid_set import valid_set
from molehunt.stress.text_behaviour import stress_text
from random_dictionaries import dictionary_of
from tiny_models import N_LAYERS, prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
MADE = dictionary_of("jumprelu")
LATENTS = torch.tensor([3, 8, 11])
PROMPTS = prompts(seed=3, lengths=(4, 6, 5, 7, 8, 5, 9, 4) * 2)
CONFIG = StressConfig(
    steps=4,
    levels=1,
    max_new_tokens=2,
    draws=4,
    rows=4,
    soft=SoftConfig(tokens=6, steps=40, lr=0.05),
    discrete=DiscreteConfig(tokens=3, steps=2, candidates=4, top=8),
)


@dataclass(frozen=True, eq=False)
class Overwrite:
    """Leaves nothing of what is there."""

    site: Site

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return 0 * acts + torch.linspace(-1, 1, acts.shape[-1]).to(acts)


def defence(*edits: Clamp | Overwrite) -> Defence:
    return Defence(
        edits=edits or (Clamp(SITE, MADE, LATENTS, "set", 6.0),),
        site=SITE,
        watched=WatchedLatents(MADE, LATENTS),
        constraints=(Free(), Exact(MADE, LATENTS)),
    )


def own_answers() -> set[str]:
    decoded = generate(tiny_model("llama"), tiny_tokenizer(), PROMPTS, max_new_tokens=2)
    return {str(tiny_tokenizer().decode(answer, skip_special_tokens=True)) for answer in decoded}


def case_of(fix: Defence, config: StressConfig = CONFIG, shown: Callable[[str], bool] | None = None) -> AttackedRows:
    model, tokenizer, own = tiny_model("llama"), tiny_tokenizer(), own_answers()
    judge = own.__contains__
    valid = valid_set(model, tokenizer, PROMPTS, judge, fix.edits, max_new_tokens=2)
    assert len(valid.rows) >= 2
    made = attacked_rows(model, tokenizer, valid, judge, fix, config)
    return made if shown is None else replace(made, judge=shown)


@cache
def attacked() -> tuple[InputArm, ...]:
    case = case_of(defence())
    return input_attacks(case, [[50, 51][: len(target)] for target in case.targets])


def test_a_soft_suffix_brings_it_back_and_anything_else() -> None:
    soft, discrete = attacked()
    assert (soft.name, discrete.name) == ("soft suffix", "discrete suffix")
    assert soft.recovered.estimate == 1
    assert soft.random_target.estimate >= 0.5
    assert soft.beyond_random_target.only_first == soft.random_target_rows.count(False)
    for arm in (soft, discrete):
        assert len(arm.recovered_rows) == len(arm.random_target_rows) == len(arm.drift.pre)
        assert float(arm.drift.pre.min()) > 1e-3  # nobody held it


def test_what_is_judged_is_the_typed_text_decoded_under_the_fix_and_drift_is_what_the_fix_reads() -> None:
    heard: list[str] = []
    config = replace(CONFIG, soft=None)
    case = case_of(defence(), config, shown=lambda text: bool(heard.append(text)))
    (arm,) = input_attacks(case, case.targets)
    model, tokenizer, edits = case.model, case.tokenizer, case.defence.edits
    discrete = config.discrete
    assert discrete is not None
    start = discrete_start(tokenizer, discrete.tokens)
    made = insertion_of(model, case.prompts, start, defence=edits, answers=case.targets)
    found = discrete_suffixes(made, case.prompts, 0, TargetText.of(case.targets), tokenizer, discrete, seed=config.seed)
    whole = [[*prompt, *one.tokens] for prompt, one in zip(case.prompts, found, strict=True)]
    for row, text in zip(whole, heard, strict=True):
        with torch.no_grad(), edit_sites(model, edits):
            first = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
            second = int(model(input_ids=torch.tensor([[*row, first]])).logits[0, -1].argmax())
        ends = tokenizer.eos_token_id
        decoded = [] if first == ends else [first] if second == ends else [first, second]
        assert text == tokenizer.decode(decoded, skip_special_tokens=True)

    def read(rows: list[list[int]]) -> Tensor:
        acts: list[Tensor] = []
        for row in rows:
            with torch.no_grad(), read_sites(model, [SITE]) as tap:
                model(input_ids=torch.tensor([row]))  # the clamp is at this site: nothing acts before it
            acts.append(tap[SITE][:, -1:])
        return torch.cat(acts)

    expected = drift_of(case.defence.watched, read(case.prompts), read(whole))
    torch.testing.assert_close(arm.drift.pre, expected.pre, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(arm.drift.codes, expected.codes, rtol=1e-3, atol=1e-4)


def test_a_fix_that_is_live_everywhere_and_leaves_nothing_is_not_passed() -> None:
    case = case_of(defence(Overwrite(Site(N_LAYERS - 1))))
    for arm in input_attacks(case, [[50, 51][: len(target)] for target in case.targets]):
        assert not any(arm.recovered_rows)
        assert not any(arm.random_target_rows)


def test_the_random_target_is_what_the_second_search_was_for() -> None:
    config = replace(CONFIG, discrete=None)
    case = case_of(defence(), config, shown=lambda text: False)
    (soft,) = input_attacks(case, case.targets)
    assert not any(soft.recovered_rows)
    assert all(soft.random_target_rows)


@pytest.mark.parametrize(
    ("which", "left"), [({"soft": None}, ["discrete suffix"]), ({"discrete": None}, ["soft suffix"])]
)
def test_only_what_was_asked_for(which: dict[str, None], left: list[str]) -> None:
    case = case_of(defence(), replace(CONFIG, **which))
    assert [arm.name for arm in input_attacks(case, case.targets)] == left


def test_a_whole_study_has_them_where_they_are_asked_for() -> None:
    own = own_answers()
    clean = prompts(seed=8, lengths=(5, 7, 6, 4))

    def study(config: StressConfig):
        return stress_text(tiny_model("llama"), tiny_tokenizer(), PROMPTS, clean, own.__contains__, defence(), config)

    assert [arm.name for arm in study(CONFIG).inputs] == ["soft suffix", "discrete suffix"]
    assert study(replace(CONFIG, soft=None, discrete=None)).inputs == ()
    assert StressConfig().soft is StressConfig().discrete is None


def test_prompts_that_nobody_can_type_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(defence())
    monkeypatch.setattr(discrete_suffix, "retokenised", lambda tokenizer, rows: [[7, *row] for row in rows])
    with pytest.raises(NotTestable, match="read as other tokens"):
        input_attacks(case, case.targets)
