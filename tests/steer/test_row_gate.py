import copy

import pytest
import torch

from molehunt.contracts import Gate
from molehunt.errors import CannotTap
from molehunt.model.cache import left_by, with_cache
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.add import Add
from molehunt.steer.clip import Clip
from molehunt.steer.row_gate import AboveRange, RowGate, gate_at_prefill
from tiny_models import ARCHITECTURES, hooks, prompts, tiny_model, tiny_tokenizer, with_lora

D = 32
SITE = Site(1)
RNG = torch.Generator().manual_seed(11)
DIRECTIONS = torch.randn(2, D, generator=RNG)
LO, HI = torch.tensor([-0.2, -0.1]), torch.tensor([0.1, 0.3])
PROMPTS = prompts(lengths=(3, 9, 5, 17, 17, 1, 12, 9))
FLAG = torch.tensor([True, False, False, True, False, True, True, False])
"""Of each prompt; the lengths of flagged and other prompts lie between each other, as generation sorts by them."""
every = pytest.mark.parametrize("kind", ["clip", "ablate", "add"])


def behind(gate, kind):
    if kind == "clip":
        return Clip(SITE, DIRECTIONS, LO, HI, gate=gate)
    if kind == "ablate":
        return Ablate(SITE, DIRECTIONS, gate=gate)
    return Add(SITE, DIRECTIONS[0], 2.0, gate=gate)


def flagged(ids, mask):
    """The rows that begin with a flagged prompt, however they are padded and whatever follows."""
    begins = [tuple(prompt) for prompt, flag in zip(PROMPTS, FLAG, strict=True) if flag]
    rows = [tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
    return torch.tensor([any(row[: len(begin)] == begin for begin in begins) for row in rows])


def some_acts(dtype=torch.float32):
    return torch.randn(5, 7, D, generator=torch.Generator().manual_seed(4)).to(dtype)


# ---------------------------------------------------------------------------------------------- one pass


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["00000", "10010", "11111"])
def test_closed_rows_are_bit_equal_and_open_ones_are_edited_as_if_alone(kind, dtype, rows):
    acts = some_acts(dtype)
    gate = RowGate(torch.tensor([row == "1" for row in rows]))
    assert isinstance(gate, Gate)
    edited, without = behind(gate, kind)(acts), behind(None, kind)(acts)
    assert edited[~gate.rows].equal(acts[~gate.rows])
    assert edited[gate.rows].equal(without[gate.rows])
    for row in gate.rows.nonzero()[:, 0]:
        torch.testing.assert_close(edited[row : row + 1], behind(None, kind)(acts[row : row + 1]))


def test_keep_follows_rows_that_leave_and_change_places():
    gate = RowGate(torch.tensor([True, False, True, False, False]))
    acts = some_acts()
    assert gate(acts).tolist() == [[flag] * 7 for flag in (True, False, True, False, False)]
    gate.select_rows(torch.tensor([0, 1, 4]))
    gate.select_rows(torch.tensor([2, 0]))
    assert gate(acts[:2]).tolist() == [[False] * 7, [True] * 7]
    gate.select_rows(torch.tensor([], dtype=torch.long))
    assert gate(acts[:0]).shape == (0, 7)


def test_a_batch_of_another_size_is_an_error():
    gate = RowGate(torch.tensor([True, False]))
    for acts in (some_acts(), some_acts()[:1]):
        with pytest.raises(ValueError, match=r"decided for 2 rows and meets a batch of \d; call select_rows"):
            gate(acts)


# ------------------------------------------------------------------------------------------ generation


def text(model, rows, interventions=(), stop=range(3, 15), **options):
    """Completions of many lengths, as many tokens stop them."""
    return generate(model, tiny_tokenizer(), rows, max_new_tokens=16, interventions=interventions, stop=stop, **options)


def apart(model, rows, flags, kind):
    """What each row gives with the intervention on, or off, on every row of its batch."""
    on, off = text(model, rows, [behind(None, kind)]), text(model, rows)
    assert on != off
    return [on[i] if flag else off[i] for i, flag in enumerate(flags)]


@every
@pytest.mark.parametrize("batch_size", [3, 64])
def test_generation_acts_on_the_decided_rows_alone_while_others_leave(kind, batch_size):
    model = tiny_model("llama")
    before = hooks(model)
    with gate_at_prefill(model, flagged) as gate:
        found = text(model, PROMPTS, [behind(gate, kind)], batch_size=batch_size)
    assert hooks(model) == before
    assert found == apart(model, PROMPTS, FLAG, kind)
    for flag in (True, False):
        assert (
            len({len(row) for row, flag_of in zip(found, FLAG, strict=True) if flag_of == flag}) > 2
        )  # rows did leave


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_cache(architecture):
    model = tiny_model(architecture)
    with gate_at_prefill(model, flagged) as gate:
        found = text(model, PROMPTS, [behind(gate, "clip")])
    assert found == apart(model, PROMPTS, FLAG, "clip")


def test_rows_in_a_peft_wrapper():
    model = with_lora(tiny_model("llama"), "llama")
    with gate_at_prefill(model, flagged) as gate:
        found = text(model, PROMPTS, [behind(gate, "clip")])
    assert found == apart(model, PROMPTS, FLAG, "clip")


@pytest.mark.parametrize("flag", [False, True])
def test_one_verdict_for_all_is_no_gate(flag):
    model = tiny_model("llama")
    with gate_at_prefill(model, lambda ids, mask: torch.full((len(ids),), flag)) as gate:
        found = text(model, PROMPTS, [behind(gate, "clip")])
    assert found == text(model, PROMPTS, [behind(None, "clip")] if flag else [])


def test_turns_that_are_prefilled_whole_are_decided_again():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    asked = []

    def decide(ids, mask):
        asked.append(len(ids))
        return flagged(ids, mask)

    turn, then = [5, 6, 7], PROMPTS
    expected = PROMPTS
    with gate_at_prefill(model, decide) as gate:
        for _ in range(3):
            answers = generate(
                model, tokenizer, then, max_new_tokens=5, interventions=[behind(gate, "add")], batch_size=5
            )
            then = [row + answer + turn for row, answer in zip(then, answers, strict=True)]
    for _ in range(3):
        on = generate(model, tokenizer, expected, max_new_tokens=5, interventions=[behind(None, "add")])
        off = generate(model, tokenizer, expected, max_new_tokens=5)
        answers = [on[i] if flag else off[i] for i, flag in enumerate(FLAG)]
        expected = [row + answer + turn for row, answer in zip(expected, answers, strict=True)]
    assert then == expected
    assert asked == [5, 3] * 3  # once a batch


@torch.no_grad()
def test_a_turn_that_continues_on_the_cache_keeps_its_verdict():
    model, asked = tiny_model("llama"), []

    def decide(ids, mask):
        asked.append(ids.shape)
        return torch.tensor([True, False])

    first, second = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11, 12], [13, 14]])
    with gate_at_prefill(model, decide) as gate, edit_sites(model, [behind(gate, "clip")]):
        cache = left_by(model(first, use_cache=True))
        gated = model(second, **with_cache(model, cache)).logits
    both = torch.cat([first, second], dim=1)
    with edit_sites(model, [behind(None, "clip")]):
        on = model(both).logits[:, 3:]
    torch.testing.assert_close(gated[0], on[0])
    torch.testing.assert_close(gated[1], model(both).logits[1, 3:])
    assert asked == [(2, 3)]


@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_own_generate(beams):
    """Beam search moves rows about in the batch, and prepares the cache beforehand."""
    model, rows = tiny_model("llama"), [PROMPTS[0], PROMPTS[2], PROMPTS[6]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 8, "attention_mask": (ids != 0).long()}
    off = model.generate(ids, **options)
    with edit_sites(model, [behind(None, "clip")]):
        on = model.generate(ids, **options)
    with gate_at_prefill(model, flagged) as gate, edit_sites(model, [behind(gate, "clip")]):
        found = model.generate(ids, **options)
    flags = [True, False, True]
    assert found.tolist() == [(on if flag else off)[i].tolist() for i, flag in enumerate(flags)]
    assert not on.equal(off)


@torch.no_grad()
def test_two_gates_follow_the_same_rows_and_the_cache_is_given_back():
    model = tiny_model("llama")

    def others(ids, mask):
        return ~flagged(ids, mask)

    with gate_at_prefill(model, flagged) as gate:
        with gate_at_prefill(model, others) as other:
            found = text(model, PROMPTS, [behind(gate, "clip"), behind(other, "add")])
            cache = left_by(model(torch.tensor(prompts(lengths=(4, 4, 4)))))
            cache.batch_select_indices(torch.tensor([0, 2]))
            assert len(gate.rows) == len(other.rows) == 2
            twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        assert (len(gate.rows), len(other.rows)) == (3, 2)
    cache.batch_select_indices(torch.tensor([0]))
    assert (len(gate.rows), len(other.rows)) == (3, 2)
    on, off = text(model, PROMPTS, [behind(None, "clip")]), text(model, PROMPTS, [behind(None, "add")])
    assert found == [on[i] if flag else off[i] for i, flag in enumerate(FLAG)]
    twin.batch_select_indices(torch.tensor([1]))
    assert twin.layers[0].keys.shape[0] == cache.layers[0].keys.shape[0] == 1


@torch.no_grad()
def test_passes_without_a_cache_are_each_decided():
    model, asked = tiny_model("llama"), []

    def decide(ids, mask):
        assert mask.all()
        asked.append(len(ids))
        return torch.ones(len(ids), dtype=torch.bool)

    ids = torch.tensor(prompts(lengths=(4, 4, 4)))
    with gate_at_prefill(model, decide) as gate, edit_sites(model, [behind(gate, "clip")]):
        model(ids, use_cache=False)
        found = model(ids[:2], use_cache=False).logits
    with edit_sites(model, [behind(None, "clip")]):
        assert model(ids[:2], use_cache=False).logits.equal(found)
    assert asked == [3, 2]


@torch.no_grad()
def test_what_cannot_be_decided_on_is_refused():
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(4, 4)))
    early = left_by(model(ids))
    with gate_at_prefill(model, flagged):
        first = left_by(model(ids))
        model(ids[:, :1], **with_cache(model, first))
        with pytest.raises(CannotTap, match="prefilled before"):
            model(ids[:, :1], **with_cache(model, early))
        model(ids)
        with pytest.raises(CannotTap, match="another one was since"):
            model(ids[:, :1], **with_cache(model, first))
        with pytest.raises(CannotTap, match="no token ids"):
            model(inputs_embeds=torch.zeros(2, 4, D))
        with pytest.raises(CannotTap, match="which tokens are padding"):
            model(ids, attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))
    assert hooks(model) == 0


@torch.no_grad()
def test_hooks_are_gone_after_an_exception_and_the_cache_is_its_own():
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(4, 4)))
    with pytest.raises(ZeroDivisionError), gate_at_prefill(model, flagged) as gate:
        cache = left_by(model(ids))
        raise ZeroDivisionError
    assert hooks(model) == 0
    cache.batch_select_indices(torch.tensor([1]))
    assert len(gate.rows) == 2


# ----------------------------------------------------------------------------------------- above range


def test_fires_at_tokens_out_of_any_range_and_at_nan():
    gate = AboveRange(SITE, 3 * torch.eye(4)[:2], torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert isinstance(gate, Gate)
    tokens = [[0, 1], [1, 0], [-1, 2], [1.01, 1], [0, -0.01], [0, 2.5], [5, 5], [float("nan"), 1]]
    acts = torch.tensor([[[*token, 99, 99] for token in tokens]])
    assert gate(acts).tolist() == [[False, False, False, True, True, True, True, True]]
    assert gate(acts[:, :4].bfloat16()).tolist() == [[False, False, False, True]]


def test_a_range_that_ends_before_it_starts_is_an_error():
    with pytest.raises(ValueError, match=r"L1\.resid: every lo must be at most its hi"):
        AboveRange(SITE, DIRECTIONS, HI, LO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_to_the_same_ranges_needs_no_gate_and_the_others_leave_normal_tokens_alone(dtype):
    acts = some_acts(dtype)
    lo, hi = torch.tensor([-1.0, -0.9]), torch.tensor([0.8, 1.1])
    gate = AboveRange(SITE, DIRECTIONS, lo, hi)
    fires = gate(acts)
    assert fires.any()
    assert not fires.all()
    assert Clip(SITE, DIRECTIONS, lo, hi, gate=gate)(acts).equal(Clip(SITE, DIRECTIONS, lo, hi)(acts))
    for kind in ("ablate", "add"):
        edited = behind(gate, kind)(acts)
        assert edited[~fires].equal(acts[~fires])
        assert edited[fires].equal(behind(None, kind)(acts)[fires])
        assert (edited[fires] != acts[fires]).any(-1).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decides_at_every_token_of_padded_cached_batches(architecture):
    model = tiny_model(architecture)
    never = AboveRange(SITE, DIRECTIONS, torch.full((2,), -1e6), torch.full((2,), 1e6))
    assert text(model, PROMPTS, [behind(never, "add")]) == text(model, PROMPTS)
    always = AboveRange(SITE, DIRECTIONS, torch.full((2,), 1e6), torch.full((2,), 1e6))
    assert text(model, PROMPTS, [behind(always, "add")]) == text(model, PROMPTS, [behind(None, "add")])

    gate = AboveRange(SITE, DIRECTIONS, torch.tensor([-2.0, -2.0]), torch.tensor([2.0, 2.0]))
    found = text(model, PROMPTS, [behind(gate, "add")], stop=())
    assert found not in (text(model, PROMPTS, stop=()), text(model, PROMPTS, [behind(None, "add")], stop=()))
    with torch.no_grad(), edit_sites(model, [behind(gate, "add")]):  # one row at a time, without a cache
        for row, completion in zip(PROMPTS, found, strict=True):
            logits = model(torch.tensor([[*row, *completion]]), use_cache=False).logits[0]
            assert logits[len(row) - 1 : -1].argmax(-1).tolist() == completion
