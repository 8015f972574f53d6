"""Steering vectors: arithmetic, disk, application."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.clip import Clip
from molehunt.steer.scope import last_of_prompt, token_scope
from molehunt.steer.vector import SteeringVector, VectorFacts
from tiny_models import hooks, tiny_model, tiny_tokenizer

FACTS = VectorFacts(method="by hand", model="a" * 64, n_layers=3, d_model=32)
PROMPTS = [[5, 6, 7, 8, 9], [5, 11, 6, 7], [12, 13, 14, 15, 16, 17, 18, 19]]


def drawn(*layers: int, seed: int = 0) -> SteeringVector:
    rng = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: 8 * torch.randn(32, generator=rng) for layer in layers}, FACTS)


def answers(model) -> list[list[int]]:
    return generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=5, stop=[])


def test_arithmetic_is_that_of_the_vectors() -> None:
    a, b = drawn(0), drawn(0, 1, seed=1)
    both = a + b
    assert both.vectors[0].equal(a.vectors[0] + b.vectors[0]) and both.vectors[1].equal(b.vectors[1])
    assert (b - b).vectors[1].abs().max() == 0 and (2 * a).vectors[0].equal(2 * a.vectors[0])
    assert (-a).vectors[0].equal(-a.vectors[0]) and b.only([1]).sites == (Site(1),)
    wide = SteeringVector({0: torch.zeros(16)}, VectorFacts(method="x", n_layers=3, d_model=16))
    with pytest.raises(UsageError, match="3 blocks of width 32; the other has 3 of 16"):
        _ = a + wide


def test_disk_keeps_every_bit_and_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    vector = drawn(0, 1)
    again = SteeringVector.load(str(vector.save(str(tmp_path / "v.safetensors"))), model="a" * 64)
    assert again.facts == FACTS and all(again.vectors[i].equal(v) for i, v in vector.vectors.items())
    with pytest.raises(UsageError, match="another checkpoint"):
        SteeringVector.load(tmp_path / "v.safetensors", model="b" * 64)
    save_file({"L0": torch.zeros(32)}, tmp_path / "w.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"{}")
    header = {"molehunt_steer": '{"schema": 1, "method": "x", "n_layers": 3, "d_model": 32}'}
    save_file({"L9": torch.zeros(32)}, tmp_path / "y.safetensors", header)
    save_file({"L0": torch.full((32,), torch.nan)}, tmp_path / "z.safetensors", header)
    for name in ("w", "x", "y", "z", "missing"):
        with pytest.raises(InvalidInput, match="no steering vector"):
            SteeringVector.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("scope", ["all", "prompt", "generation", "last"])
@pytest.mark.parametrize("operator", ["add", "ablate"])
def test_applied_steers_and_leaves_nothing_behind(scope, operator) -> None:
    model = tiny_model("llama", 0)
    before, plain, vector = hooks(model), answers(model), drawn(1)
    with vector.applied(model, 0.0, operator=operator, scope=scope):
        assert answers(model) == plain
    with pytest.raises(RuntimeError, match="stop"), vector.applied(model, operator=operator, scope=scope):
        steered = answers(model)
        raise RuntimeError("stop")
    assert hooks(model) == before and answers(model) == plain
    if operator == "add":
        assert steered != plain
    handle = vector.attach(model, operator=operator, scope=scope)
    assert answers(model) == steered
    handle.remove()
    handle.remove()
    assert hooks(model) == before and answers(model) == plain


def test_a_scope_is_the_gate_of_that_name() -> None:
    model, vector = tiny_model("llama", 0), drawn(1)
    with vector.applied(model, 1.0, scope="last"):
        got = answers(model)
    with token_scope(model, last_of_prompt) as gate:
        edit = Add(Site(1), vector.vectors[1], 1.0, gate)
        expected = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=5, interventions=[edit], stop=[])
    assert got == expected
    with vector.applied(model, 1.0, scope=last_of_prompt):
        assert answers(model) == expected


def test_a_clip_holds_projections_inside_each_blocks_range() -> None:
    model, vector = tiny_model("llama", 0), drawn(0, 2)
    ranges, ids = {0: (-0.1, 0.2), 2: (0.3, 5.0)}, torch.tensor([PROMPTS[2]])
    units = {layer: v / v.norm() for layer, v in vector.vectors.items()}

    @torch.no_grad()
    def projections() -> dict[int, torch.Tensor]:
        with read_sites(model, vector.sites) as tap:
            model(ids)
        return {site.layer: tap[site] @ units[site.layer] for site in vector.sites}

    plain = projections()
    with vector.applied(model, operator="clip", ranges=ranges):
        held = projections()
    for layer, (lo, hi) in ranges.items():
        assert plain[layer].min() < lo or plain[layer].max() > hi
        assert held[layer].min() > lo - 1e-4 and held[layer].max() < hi + 1e-4
    torch.testing.assert_close(held[0], plain[0].clamp(-0.1, 0.2))
    lo, hi = torch.tensor([-0.1]), torch.tensor([0.2])
    with torch.no_grad():
        with edit_sites(model, [Clip(Site(0), vector.vectors[0][None], lo, hi, 0.5)]):
            expected = model(ids).logits
        with vector.only([0]).applied(model, 0.5, operator="clip", ranges={0: (-0.1, 0.2)}):
            assert model(ids).logits.equal(expected)
    for operator, wrong in (("clip", None), ("clip", {0: (0.0, 1.0)}), ("add", ranges), ("ablate", ranges)):
        with pytest.raises(UsageError, match=f"{operator} takes ranges for the blocks"):
            vector.interventions(operator=operator, ranges=wrong)


def test_a_model_of_another_shape_is_refused() -> None:
    deep = SteeringVector({5: torch.zeros(32)}, VectorFacts(method="x", n_layers=6, d_model=32))
    with pytest.raises(UsageError, match="6 blocks of width 32"), deep.applied(tiny_model("llama", 0)):
        pass
    for wrong in ({}, {7: torch.zeros(32)}, {0: torch.zeros(8)}, {0: torch.full((32,), torch.inf)}):
        with pytest.raises(ValueError):
            SteeringVector(wrong, FACTS)


@pytest.mark.parametrize("method", ["difference in means", "pca", "logistic probe"])
def test_every_method_finds_a_planted_shift(method) -> None:
    rng = torch.Generator().manual_seed(3)
    truth = torch.randn(32, generator=rng)
    truth = 6 * truth / truth.norm()
    clean = torch.randn(400, 32, generator=rng)
    site = Site(1)
    found = SteeringVector.from_acts({site: clean + truth + 0.1 * torch.randn(400, 32, generator=rng)}, {site: clean},
                            method=method, facts=FACTS)  # fmt: skip
    vector = found.vectors[1]
    assert float(torch.cosine_similarity(vector, truth, dim=0)) > 0.97
    assert float(vector.norm()) == pytest.approx(6.0, rel=0.05)
    assert (found.facts.method, found.facts.positive, found.facts.negative) == (method, 400, 400)
    control = found.random_like(0)
    assert float(control.vectors[1].norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(control.vectors[1], truth, dim=0))) < 0.6


def test_no_difference_and_unpaired_rows_are_refused() -> None:
    rows = torch.randn(5, 32)
    with pytest.raises(NotTestable):
        SteeringVector.from_acts({Site(0): rows}, {Site(0): rows}, facts=FACTS)
    with pytest.raises(UsageError, match=r"the method pca pairs the prompts .* got 5 with the behaviour and 4 without"):
        SteeringVector.from_acts({Site(0): rows}, {Site(0): rows[:4] - 1}, method="pca", facts=FACTS)
