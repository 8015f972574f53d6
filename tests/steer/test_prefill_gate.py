"""Conditional steering: rows decided by the activations of their prompts, and followed while they decode."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from molehunt.contracts import Gate
from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.errors import CannotTap, InvalidInput, NotTestable, UsageError
from molehunt.measure.interval import proportion
from molehunt.model.cache import left_by, with_cache
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.prefill_gate import Condition, linear_score, prefill_gate, prompt_scores
from molehunt.steer.vector import SteeringVector, VectorFacts
from tiny_models import ARCHITECTURES, hooks, prompts, tiny_model, tiny_tokenizer, with_lora

D = 32
SITE = Site(1)
RNG = torch.Generator().manual_seed(12)
WEIGHT, PUSH = torch.randn(D, generator=RNG), 4 * torch.randn(D, generator=RNG)
SCORE = linear_score(WEIGHT, 0.5)
PROMPTS = prompts(lengths=(3, 9, 5, 17, 17, 2, 12, 9))
POOLINGS = ("max", "last")


def by_hand(model, prompt: list[int], site: Site, pooling: str) -> float:
    """One row alone, without padding, without a cache; in a loop over tokens."""
    with torch.inference_mode(), read_sites(model, [site]) as tap:
        model(torch.tensor([prompt]), use_cache=False)
    tokens = tap[site][0].float()
    scores = [float(token @ WEIGHT) + 0.5 for token in tokens]
    median = tokens.norm(dim=-1).median()
    harmless = [i > 0 and bool(token.norm() <= 10 * median) for i, token in enumerate(tokens)]
    return scores[-1] if pooling == "last" else max(s for s, one in zip(scores, harmless, strict=True) if one)


def decided(model, rows=PROMPTS, site: Site = SITE, pooling: str = "max") -> tuple[float, list[bool]]:
    """A threshold amid the rows' scores, and which lie above it."""
    result = [by_hand(model, row, site, pooling) for row in rows]
    between = sorted(result)[len(result) // 2 - 1 : len(result) // 2 + 1]
    threshold = sum(between) / 2
    assert between[1] - between[0] > 1e-3
    return threshold, [one > threshold for one in result]


def text(model, rows, *interventions, stop=range(3, 15), **options) -> list[list[int]]:
    """Completions of many lengths, as many tokens stop them."""
    return generate(model, tiny_tokenizer(), rows, max_new_tokens=16, interventions=interventions, stop=stop, **options)


def apart(model, rows, flags, edit: Site) -> list[list[int]]:
    """What each row gives with the intervention on, or off, on every row of its batch."""
    on, off = text(model, rows, Add(edit, PUSH, 1.0)), text(model, rows)
    assert {flag for a, b, flag in zip(on, off, flags, strict=True) if a != b} == {True, False}
    return [on[i] if flag else off[i] for i, flag in enumerate(flags)]


# ------------------------------------------------------------------------------------------ which rows


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_each_prompt_by_itself(architecture: str, pooling: str) -> None:
    model = tiny_model(architecture)
    before = hooks(model)
    found = prompt_scores(model, PROMPTS, SITE, SCORE, pooling=pooling)
    expected = torch.tensor([by_hand(model, prompt, SITE, pooling) for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert hooks(model) == before


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("edit", [SITE, Site(2)], ids=str)
def test_the_rows_above_the_threshold_are_steered_while_others_leave(edit: Site, batch_size: int, pooling: str) -> None:
    model = tiny_model("llama")
    before = hooks(model)
    threshold, flags = decided(model, pooling=pooling)
    with prefill_gate(model, SITE, SCORE, threshold, pooling=pooling) as gate:
        assert isinstance(gate, Gate)
        found = text(model, PROMPTS, Add(edit, PUSH, 1.0, gate), batch_size=batch_size)
    assert hooks(model) == before
    assert found == apart(model, PROMPTS, flags, edit)
    assert len({len(row) for row in found}) > 2  # rows did leave


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_at_the_gates_own_site(architecture: str) -> None:
    model = tiny_model(architecture)
    threshold, flags = decided(model)
    with prefill_gate(model, SITE, SCORE, threshold) as gate:
        found = text(model, PROMPTS, Add(SITE, PUSH, 1.0, gate))
    assert found == apart(model, PROMPTS, flags, SITE)


def test_rows_in_a_peft_wrapper_and_other_streams() -> None:
    model, site = with_lora(tiny_model("llama"), "llama"), Site(1, "mlp")
    threshold, flags = decided(model, site=site)
    with prefill_gate(model, site, SCORE, threshold) as gate:
        found = text(model, PROMPTS, Add(SITE, PUSH, 1.0, gate))  # the block's output comes after its MLP's
    assert found == apart(model, PROMPTS, flags, SITE)


@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_own_generate(beams: int) -> None:
    model, rows = tiny_model("llama"), PROMPTS[:4]
    threshold, flags = decided(model, rows)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 8, "attention_mask": (ids != 0).long()}
    off = model.generate(ids, **options)
    with edit_sites(model, [Add(SITE, PUSH, 1.0)]):
        on = model.generate(ids, **options)
    with prefill_gate(model, SITE, SCORE, threshold) as gate, edit_sites(model, [Add(SITE, PUSH, 1.0, gate)]):
        found = model.generate(ids, **options)
    assert found.tolist() == [(on if flag else off)[i].tolist() for i, flag in enumerate(flags)]
    assert not on.equal(off)


def test_it_reads_before_its_own_edit_and_after_edits_that_were_there_first() -> None:
    model = tiny_model("llama")
    threshold, flags = decided(model)
    with prefill_gate(model, SITE, SCORE, threshold) as gate, edit_sites(model, [Add(SITE, 99 * WEIGHT, 1.0, gate)]):
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=1, stop=())
        order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
        assert gate.rows.tolist() == [flags[i] for i in order]
    with edit_sites(model, [Add(SITE, 99 * WEIGHT, 1.0)]), prefill_gate(model, SITE, SCORE, threshold) as gate:
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=1, stop=())
        assert gate.rows.all()


@torch.no_grad()
def test_a_turn_that_continues_on_the_cache_keeps_its_verdict() -> None:
    model = tiny_model("llama")
    first, second = torch.tensor(prompts(lengths=(4, 4))), torch.tensor([[11, 12], [13, 14]])
    threshold, flags = decided(model, first.tolist())
    with prefill_gate(model, SITE, SCORE, threshold) as gate, edit_sites(model, [Add(SITE, PUSH, 1.0, gate)]):
        cache = left_by(model(first, use_cache=True))
        assert gate.rows.tolist() == flags
        gated = model(second, **with_cache(model, cache)).logits
        assert gate.rows.tolist() == flags  # though the second turn's tokens were seen at the site, too
        uncached = model(first[:1], use_cache=False).logits
        assert gate.rows.tolist() == flags[:1]
    both = torch.cat([first, second], dim=1)
    off = model(both).logits
    with edit_sites(model, [Add(SITE, PUSH, 1.0)]):
        on = model(both).logits
    for row, flag in enumerate(flags):
        torch.testing.assert_close(gated[row], (on if flag else off)[row, 4:])
    torch.testing.assert_close(uncached[0], (on if flags[0] else off)[0, :4])


def test_a_row_that_scores_nan_is_steered_whatever_its_padding_scores() -> None:
    model, odd = tiny_model("llama"), torch.tensor([row[-1] for row in PROMPTS])

    def score(acts: Tensor) -> Tensor:
        result = torch.full(acts.shape[:2], -1.0)
        result[2, -1] = torch.nan
        result[0, 0] = torch.nan  # generation pads the shortest row on the left
        return result

    with prefill_gate(model, SITE, score, 0.0) as gate, edit_sites(model, [Add(SITE, PUSH, 0.0, gate)]):
        text(model, PROMPTS, stop=odd.tolist())
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=1, stop=())
    assert gate.rows.tolist() == [i == 2 for i in range(len(PROMPTS))]


@torch.no_grad()
def test_an_intervention_before_the_decision_is_refused() -> None:
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(4, 4)))
    early = pytest.raises(UsageError, match=r"decided at L1\.resid, and an intervention behind it acts before")
    with prefill_gate(model, SITE, SCORE, 0.0) as gate, edit_sites(model, [Add(Site(0), PUSH, 1.0, gate)]), early:
        model(ids)
    assert hooks(model) == 0
    with prefill_gate(model, SITE, SCORE, 0.0), pytest.raises(CannotTap, match="no token ids"):
        model(inputs_embeds=torch.zeros(2, 4, D))
    with pytest.raises(CannotTap, match=r"there is no L7\.resid"), prefill_gate(model, Site(7), SCORE, 0.0):
        pass
    narrow = linear_score(torch.zeros(5))
    with pytest.raises(UsageError, match="reads 5 values a token, and the model has 32"):
        prompt_scores(model, PROMPTS, SITE, narrow)
    assert hooks(model) == 0


@torch.no_grad()
def test_hooks_are_gone_after_an_exception_and_the_cache_is_its_own() -> None:
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(4, 4)))
    with pytest.raises(ZeroDivisionError), prefill_gate(model, SITE, SCORE, 0.0) as gate:
        cache = left_by(model(ids))
        raise ZeroDivisionError
    assert hooks(model) == 0
    cache.batch_select_indices(torch.tensor([1]))
    assert len(gate.rows) == 2

    def fails(acts: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), prefill_gate(model, SITE, fails, 0.0):
        model(ids)
    assert hooks(model) == 0


def test_a_vector_is_applied_behind_it() -> None:
    model = tiny_model("llama")
    before = hooks(model)
    threshold, flags = decided(model)
    vector = SteeringVector({1: PUSH, 2: -PUSH}, VectorFacts(method="by hand", n_layers=3, d_model=D))

    def answers() -> list[list[int]]:
        return text(model, PROMPTS)

    off = answers()
    with vector.applied(model):
        on = answers()
    with prefill_gate(model, SITE, SCORE, threshold) as gate, vector.applied(model, gate=gate):
        found = answers()
    assert found == [on[i] if flag else off[i] for i, flag in enumerate(flags)] and on != off
    assert hooks(model) == before
    both = pytest.raises(ValueError, match="takes the place of a scope")
    with prefill_gate(model, SITE, SCORE, threshold) as gate, both:
        vector.attach(model, scope="last", gate=gate)


# ----------------------------------------------------------------------------------------- calibration


def condition(**result) -> Condition:
    fixed = {"site": SITE, "weight": WEIGHT, "bias": 0.1, "pooling": "last", "threshold": 1.5, "fpr": 0.05, "clean": 99}
    return Condition(**{**fixed, **result})


@given(st.integers(19, 400), st.sampled_from([0.01, 0.05, 0.2]), st.integers(0, 99))
def test_too_few_clean_prompts_abstain_and_enough_hold_their_own_rate(n: int, fpr: float, seed: int) -> None:
    clean = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if n + 1 < round(1 / fpr):
        with pytest.raises(NotTestable, match=f"{n} clean rows cannot hold"):
            Condition.calibrated(SITE, WEIGHT, clean=clean, fpr=fpr)
        return
    found = Condition.calibrated(SITE, WEIGHT, clean=clean, fpr=fpr)
    assert float((clean > found.threshold).double().mean()) <= fpr
    assert (found.fpr, found.clean, found.pooling, found.bias) == (fpr, n, "max", 0.0)


def test_fresh_clean_rows_are_steered_at_the_stated_rate() -> None:
    """Over many draws the mean rate is the conformal one, and each measured rate's interval holds what was asked."""
    fpr, rates, held = 0.05, [], 0
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        clean, fresh = torch.randn(2000, generator=rng) ** 3, torch.randn(500, generator=rng) ** 3
        found = Condition.calibrated(SITE, WEIGHT, clean=clean, fpr=fpr)
        steered = int((fresh > found.threshold).sum())
        rates.append(steered / 500)
        interval = proportion(steered, 500)
        held += interval.low <= fpr <= interval.high
    assert held >= 0.9 * 200
    mean = proportion(round(500 * sum(rates)), 500 * 200)
    assert mean.low - 0.002 <= fpr <= mean.high + 0.002


def test_a_calibrated_condition_steers_fresh_prompts_of_a_model_at_its_rate() -> None:
    """From a probe that tells rows with one token from others, through a model, to the rows that it steers."""
    model, marked = tiny_model("llama"), 50
    with torch.no_grad():
        model.model.embed_tokens.weight[marked] = 20 * torch.nn.functional.normalize(PUSH, dim=0)
    lengths = tuple(6 + i % 9 for i in range(600))
    harmless = [[t for t in row if t != marked] for row in prompts(seed=1, lengths=lengths)]
    bad = [[*row[:-1], marked, row[-1]] for row in prompts(seed=2, lengths=lengths[:200])]
    acts, is_bad = [], []
    for row in (*harmless[:100], *bad[:100]):
        with torch.inference_mode(), read_sites(model, [SITE]) as tap:
            model(torch.tensor([row]))
        acts.append(tap[SITE][0, 1:])
        is_bad.append(torch.tensor(row[1:]) == marked)
    probe = LogisticProbe.fit(SITE, torch.cat(acts), torch.cat(is_bad))
    score = linear_score(probe.weight, probe.bias)
    clean = prompt_scores(model, harmless[100:400], SITE, score)
    found = Condition.calibrated(SITE, probe.weight, probe.bias, clean=clean, fpr=0.05)

    def steered(rows: list[list[int]]) -> list[bool]:
        result: list[bool] = []
        with found.gate(model) as gate, edit_sites(model, [Add(SITE, PUSH, 0.0, gate)]):
            for start in range(0, len(rows), 50):
                some = rows[start : start + 50]
                order = sorted(range(len(some)), key=lambda i: len(some[i]))
                generate(model, tiny_tokenizer(), some, max_new_tokens=1, stop=())
                flags = dict(zip(order, gate.rows.tolist(), strict=True))
                result += [flags[i] for i in range(len(some))]
        return result

    fresh, caught = harmless[400:], bad[100:]
    flags = steered(fresh)
    assert flags == (prompt_scores(model, fresh, SITE, score) > found.threshold).tolist()
    interval = proportion(sum(flags), len(flags))
    assert interval.low <= 0.05 <= interval.high
    assert sum(steered(caught)) >= 0.9 * len(caught)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_condition_opens_the_gate_of_its_own_score(pooling: str) -> None:
    model = tiny_model("llama")
    threshold, flags = decided(model, pooling=pooling)
    order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    with condition(bias=0.5, pooling=pooling, threshold=threshold).gate(model) as gate:
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=1, stop=())
        assert gate.rows.tolist() == [flags[i] for i in order]
    assert decided(model)[1] != decided(model, pooling="last")[1]


def test_disk_keeps_every_bit_and_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    saved = condition(threshold=1 / 3, bias=-0.1)
    again = Condition.load(saved.save(tmp_path / "c.safetensors"))
    result, wanted = asdict(again), asdict(saved)
    assert result.pop("weight").equal(wanted.pop("weight")) and result == wanted
    good = {"schema": 1, "site": "L1.resid", "bias": 0.0, "pooling": "max", "threshold": 0.0, "fpr": 0.1, "clean": 9}
    bad = {
        "other": {},
        "list": [],
        "text": "no",
        "version": {**good, "schema": 2},
        "site": {**good, "site": "layer 3"},
        "more": {**good, "code": "x"},
        "less": {k: v for k, v in good.items() if k != "threshold"},
        "rate": {**good, "fpr": 1.5},
        "none": {**good, "clean": 0},
    }
    for name, header in bad.items():
        save_file({"weight": WEIGHT}, tmp_path / f"{name}.safetensors", {"molehunt_condition": json.dumps(header)})
    header = {"molehunt_condition": json.dumps(good)}
    save_file({"weight": WEIGHT}, tmp_path / "good.safetensors", header)
    save_file({"w": WEIGHT}, tmp_path / "unnamed.safetensors", header)
    save_file({"weight": WEIGHT * torch.nan}, tmp_path / "nan.safetensors", header)
    save_file({"weight": WEIGHT}, tmp_path / "plain.safetensors")
    save_file({"weight": WEIGHT}, tmp_path / "deep.safetensors", {"molehunt_condition": "[" * 200_000})
    (tmp_path / "torn.safetensors").write_bytes(b"{}")
    assert Condition.load(tmp_path / "good.safetensors").clean == 9
    for name in (*bad, "unnamed", "nan", "plain", "deep", "torn", "missing"):
        with pytest.raises(InvalidInput, match="is no condition of Molehunt's"):
            Condition.load(tmp_path / f"{name}.safetensors")


def test_a_condition_that_decides_nothing_is_an_error() -> None:
    for result in ({"weight": WEIGHT * torch.inf}, {"bias": float("nan")}, {"threshold": float("inf")}, {"fpr": 0.0}):
        with pytest.raises(ValueError, match=r"L1\.resid: "):
            condition(**result)
    assert replace(condition(), clean=1).clean == 1
