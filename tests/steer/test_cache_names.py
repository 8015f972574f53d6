"""What follows a batch keeps step with its cache under every name of it, and without one."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from molehunt.errors import CannotTap
from molehunt.model import cache as seam
from molehunt.model.cache import NAMES, branched, left_by, select_rows, with_cache
from molehunt.model.cache_check import DecodingCheck
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.following import following
from molehunt.steer.patch import Donor, prompt_patch
from molehunt.steer.prefill_gate import prefill_gate
from molehunt.steer.row_gate import gate_at_prefill
from molehunt.steer.scope import last_of_prompt, none_of_it, token_scope, whole_prompt
from molehunt.stress.attacks import soft_suffix
from molehunt.stress.attacks.soft_suffix import soft_answers
from renamed_cache import renamed
from tiny_models import D_MODEL, prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
RNG = torch.Generator().manual_seed(5)
PUSH = torch.randn(D_MODEL, generator=RNG) * 8
PROMPTS = prompts(lengths=(5, 9, 6, 8))
IDS = torch.tensor(prompts(seed=2, lengths=(6, 6, 6)))
ANSWER = [11, 12, 13]


@contextmanager
def row_gate(model):
    def decide(ids, real):
        return torch.tensor([int(row[there][0]) % 2 == 0 for row, there in zip(ids, real, strict=True)])

    with gate_at_prefill(model, decide) as gate:
        yield Add(SITE, PUSH, 1.0, gate)


@contextmanager
def threshold_gate(model):
    with prefill_gate(model, SITE, lambda acts: acts[..., 0], 0.4) as gate:
        yield Add(SITE, PUSH, 1.0, gate)


@contextmanager
def scoped(model, choose, generation=False):
    with token_scope(model, choose, generation=generation) as gate:
        yield Add(SITE, PUSH, 1.0, gate)


class Keeping:
    """Pushes each token by the number of tokens that came before it, which it knows from following the batch."""

    follows_batch = True
    site = SITE

    def begin(self, ids, real):
        self.at = torch.arange(ids.shape[1])

    def advance(self, ids):
        assert ids.shape[1] == 1
        self.at = self.at[-1:] + 1

    def __call__(self, acts):
        return acts + self.at[None, :, None] * PUSH / 20


@contextmanager
def followed(model):
    with following(model, keeping := Keeping()):
        yield keeping


@contextmanager
def patched(model):
    rng = torch.Generator().manual_seed(9)
    donors = {tuple(row): Donor((1, 2), 4 * torch.randn(2, D_MODEL, generator=rng)) for row in PROMPTS[::2]}
    with prompt_patch(model, SITE, donors) as patch:
        yield patch


WAYS = {
    "row gate": row_gate,
    "prefill gate": threshold_gate,
    "scope: prompt": lambda model: scoped(model, whole_prompt),
    "scope: answer": lambda model: scoped(model, none_of_it, generation=True),
    "scope: last": lambda model: scoped(model, last_of_prompt),
    "following": followed,
}
OURS = {**WAYS, "patch": patched}
every_way = pytest.mark.parametrize("way", WAYS)
every_name = pytest.mark.parametrize("name", NAMES)


@torch.no_grad()
def by_anybody(model, name, way):
    """Logits of a prefill and three steps as another program runs them, with an intervention inside the block."""
    with WAYS[way](model) as edit, edit_sites(model, [edit]):
        out = model(IDS, use_cache=True)
        logits = [out.logits[:, -1]]
        for token in ANSWER:
            out = model(torch.full((len(IDS), 1), token), **{name: left_by(out)})
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@torch.no_grad()
def in_one_pass(way):
    """The same, where every token is known from the beginning: the edit is worked out by hand."""
    model = tiny_model("llama")
    whole = torch.cat([IDS, torch.tensor([ANSWER] * len(IDS))], dim=1)
    at = torch.zeros(whole.shape, dtype=torch.bool)
    n = IDS.shape[1]
    if way == "row gate":
        at[:] = (IDS[:, 0] % 2 == 0)[:, None]
    elif way == "prefill gate":
        with WAYS[way](model) as edit:
            model(IDS, use_cache=False)
            at[:] = edit.gate.rows[:, None]
    elif way != "following":
        at[:, {"prompt": slice(n), "answer": slice(n, None), "last": slice(n - 1, n)}[way.split()[1]]] = True

    class ByHand:
        site = SITE

        def __call__(self, acts):
            if way == "following":
                return acts + torch.arange(whole.shape[1])[None, :, None] * PUSH / 20
            return torch.where(at[..., None], acts + PUSH, acts)

    with edit_sites(model, [ByHand()]):
        logits = model(whole, use_cache=False).logits[:, n - 1 :]
    plain = model(whole, use_cache=False).logits[:, n - 1 :]
    assert not torch.allclose(logits, plain, atol=0.1)
    assert way != "row gate" or 0 < at[:, 0].sum() < len(at)
    return logits.transpose(0, 1)


@every_way
@every_name
def test_steps_of_anybodys_decoding_are_no_prefills(way, name):
    torch.testing.assert_close(by_anybody(renamed(name), name, way), in_one_pass(way), rtol=1e-4, atol=1e-4)


@every_way
@every_name
def test_the_test_above_sees_a_step_that_is_taken_for_a_prefill(way, name, monkeypatch):
    expected, model = in_one_pass(way), renamed(name)
    monkeypatch.setattr(seam, "is_filled", lambda cache: False)
    assert not torch.allclose(by_anybody(model, name, way), expected, atol=0.1)


def answers(model, way):
    with OURS[way](model) as edit:
        return generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=6, interventions=[edit], stop=())


@pytest.mark.parametrize("way", OURS)
@every_name
def test_our_own_decoding_gives_the_same_answers_under_every_name(way, name):
    expected = answers(tiny_model("llama"), way)
    assert answers(renamed(name), way) == expected
    assert expected != generate(tiny_model("llama"), tiny_tokenizer(), PROMPTS, max_new_tokens=6, stop=())


@pytest.fixture
def no_cache(monkeypatch):
    """Every model is one that must decode without a cache."""
    check = DecodingCheck(cached=False, padded=True, why="of a test")
    monkeypatch.setattr("molehunt.model.generate.decoding_check", lambda *args, **options: check)


@pytest.mark.parametrize("way", sorted(OURS.keys() - {"following"}))
def test_answers_without_a_cache_are_those_with_one(way, request):
    expected = answers(tiny_model("llama"), way)
    request.getfixturevalue("no_cache")
    assert answers(tiny_model("llama"), way) == expected


@pytest.mark.usefixtures("no_cache")
def test_what_needs_each_step_by_itself_is_refused_without_a_cache():
    model = tiny_model("llama")
    with pytest.raises(CannotTap, match="decodes without one"):
        answers(model, "following")


def soft(model):
    embedded = torch.randn(len(PROMPTS), 2, D_MODEL, generator=torch.Generator().manual_seed(1))
    return soft_answers(model, tiny_tokenizer(), PROMPTS, embedded, marks=1, max_new_tokens=5)


@every_name
def test_soft_suffixes_are_put_into_prompts_alone_under_every_name(name):
    assert soft(renamed(name)) == soft(tiny_model("llama"))


def test_soft_suffixes_without_a_cache_are_those_with_one(request):
    expected = soft(tiny_model("llama"))
    request.getfixturevalue("no_cache")
    assert soft(tiny_model("llama")) == expected


@every_name
def test_a_soft_suffix_that_takes_a_step_for_a_prefill_does_not_pass(name, monkeypatch):
    def always_begins(model, before):
        return seam.on_decoder_calls(model, lambda call: before(replace(call, begins=True, mask=None)))

    monkeypatch.setattr(soft_suffix, "on_decoder_calls", always_begins)
    with pytest.raises(KeyError):  # one token is no prompt that it knows
        soft(renamed(name))


def test_following_refuses_a_pass_that_continues_by_several_tokens():
    model = tiny_model("llama")
    with torch.no_grad(), followed(model):
        left = left_by(model(IDS, use_cache=True))
        with pytest.raises(CannotTap, match="several tokens"):
            model(IDS[:, :2], **with_cache(model, left))


@torch.no_grad()
def test_a_cache_is_free_of_its_gate_afterwards_and_so_are_its_branches():
    model = tiny_model("llama")
    with row_gate(model) as edit:
        stem = left_by(model(IDS, use_cache=True))
        branch = branched(stem)
        select_rows(branch, torch.tensor([1]))
        assert len(edit.gate.rows) == 3 and stem.layers[0].keys.shape[0] == 3
    assert not {"reorder_cache", "batch_select_indices"} & vars(stem).keys()
    assert branch.layers[0].keys.shape[0] == 1
