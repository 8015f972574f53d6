"""What is watched, and its scores during forward passes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from molehunt.direction.weight import change_directions
from molehunt.errors import CannotTap, NotTestable
from molehunt.model.blocks import unwrapped
from molehunt.model.cache import left_by, with_cache
from molehunt.model.taps import read_sites
from molehunt.site import Site
from molehunt.watch.bank import Bank
from molehunt.watch.columns import watched
from tiny_models import ARCHITECTURES, N_LAYERS, hooks, prompts, tiny_model, with_lora
from watched_banks import bank_of, changes
from zoo import zoo_model

IDS = torch.tensor(prompts(lengths=(7, 7)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_columns_are_cosines_of_block_outputs_and_coordinates_of_matrix_inputs(architecture: str) -> None:
    model, bank = tiny_model(architecture, 1), bank_of(architecture)
    before = hooks(model)
    modules = dict(model.named_modules())
    inputs = {}
    handles = [
        modules[name].register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
        for name in bank.read
    ]
    with torch.no_grad(), read_sites(model, list(bank.write)) as tap:
        plain = model(IDS).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad(), watched(model, bank) as columns:
        logits = model(IDS).logits
        got = columns.take()

    assert logits.equal(plain) and hooks(model) == before
    expected = [normalize(tap[site], dim=-1) @ rows.mT for site, rows in bank.write.items()]
    expected += [inputs[name] @ rows.mT for name, rows in bank.read.items()]
    torch.testing.assert_close(got, torch.cat(expected, dim=-1))
    assert got.shape[-1] == len(bank.names) == len(set(bank.names))
    assert bank.written == 2 * 3 * N_LAYERS == len(bank.names) / 2  # o and down of every block, written and read
    for column in (0, bank.written, len(bank.names) + 4):
        found = bank.direction(column)
        assert bank.names[column % len(bank.names)].startswith(found.name)
        assert any(found.vector.equal(row) for row in bank.write[found.site])


def test_read_coordinates_are_what_the_change_adds_to_the_output() -> None:
    """A change of full rank in its directions: Σ σ (v·a) u = ΔW a."""
    change = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    found = change_directions(change, k=6, floor=0.0, name="model.layers.1.mlp.down_proj.weight", seed=0)
    bank = Bank.of([found], "llama", k=6)
    a = torch.randn(9)
    coordinates = bank.read["model.layers.1.mlp.down_proj"] @ a
    torch.testing.assert_close(coordinates @ bank.write[Site(1)], change @ a, rtol=1e-4, atol=1e-4)
    assert bank.write_names[Site(1)][0] == "L1 down #0"


def test_only_changed_matrices_are_watched_and_at_most_k_directions_of_each() -> None:
    all_of_them = changes("llama", k=4)
    nothing = replace(
        all_of_them[0],
        write=torch.zeros(0, 32),
        read=torch.zeros(0, 32),
        strength=torch.zeros(0),
        residual=torch.zeros(0),
    )
    bank = Bank.of([nothing, *all_of_them[1:]], "llama", k=2)
    assert all_of_them[0].name.removesuffix(".weight") not in bank.read
    assert {len(rows) for rows in bank.read.values()} == {2}
    with pytest.raises(NotTestable, match="No matrix that writes to the residual stream changed"):
        Bank.of([nothing], "llama")


def test_columns_work_under_a_lora_wrapper_and_step_by_step_under_a_cache() -> None:
    bank = bank_of("llama")
    tuned = with_lora(tiny_model("llama", 1), "llama")
    assert unwrapped(tuned) is not tuned
    with torch.no_grad(), watched(tuned, bank) as columns:
        tuned(IDS, use_cache=False)
        whole = columns.take()
        cache = left_by(tuned(IDS[:, :4], use_cache=True))
        parts = [columns.take()]
        for i in range(4, IDS.shape[1]):
            cache = left_by(tuned(IDS[:, i : i + 1], **with_cache(tuned, cache)))
            parts.append(columns.take())
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_steps_that_wait_are_scored_together_as_each_is_alone_even_where_places_have_unequal_numbers() -> None:
    model, bank = tiny_model("llama", 1), bank_of("llama")
    uneven = replace(
        bank, read={name: rows[: 1 + i % 3] for i, (name, rows) in enumerate(bank.read.items())}, read_names={}
    )
    with torch.no_grad(), watched(model, uneven) as columns:
        model(IDS)
        expected = columns.take()
        cache = left_by(model(IDS[:, :3], use_cache=True))
        with pytest.raises(ValueError, match="one token a row"):
            columns.queue()
        for i in range(3, IDS.shape[1]):
            cache = left_by(model(IDS[:, i : i + 1], **with_cache(model, cache)))
            columns.queue()
        assert columns.queued == IDS.shape[1] - 3
        torch.testing.assert_close(columns.take_queued(), expected[:, 3:], rtol=1e-4, atol=1e-5)
        assert not columns.queued
        with pytest.raises(RuntimeError, match="no step is queued"):
            columns.take_queued()


def test_some_tokens_are_scored_alone() -> None:
    model, bank = tiny_model("llama", 1), bank_of("llama")
    with torch.no_grad(), watched(model, bank) as columns:
        model(IDS)
        whole = columns.take()
        last = torch.arange(1, len(IDS) + 1)[:, None] * IDS.shape[1] - 1
        with columns.only(last):
            model(IDS)
        torch.testing.assert_close(columns.take(), whole[:, -1:])
        assert columns.passed == IDS.shape[1]
        model(IDS)
        assert columns.take().equal(whole)
        model(IDS)
        columns.forget()
        with pytest.raises(RuntimeError, match="not covered"):
            columns.take()


def test_a_pass_that_was_not_scored_cannot_be_taken() -> None:
    model, bank = tiny_model("llama", 1), bank_of("llama")
    with torch.no_grad(), watched(model, bank) as columns:
        with pytest.raises(RuntimeError, match="not covered"):
            columns.take()
        model(IDS)
        columns.take()
        with pytest.raises(RuntimeError, match="not covered"):
            columns.take()


def test_directions_of_another_model_are_refused_and_no_hook_stays() -> None:
    model = tiny_model("gpt2")
    before = hooks(model)
    with pytest.raises(NotTestable, match=r"has no model\.layers\.0"), watched(model, bank_of("llama")):
        pass
    deep = Bank.of([replace(c, name=c.name.replace("layers.2", "layers.7")) for c in changes("llama")], "llama")
    llama = tiny_model("llama")
    with pytest.raises((NotTestable, CannotTap)), watched(llama, deep):
        pass
    assert hooks(model) == before and hooks(llama) == before


def test_the_random_control_has_the_same_shape_and_other_rows() -> None:
    bank = bank_of("llama")
    control = bank.random(0)
    assert control.names == bank.names and control.sha256() != bank.sha256() == bank_of("llama").sha256()
    assert control.sha256() == bank.random(0).sha256() != bank.random(1).sha256()
    for name, rows in control.read.items():
        torch.testing.assert_close(rows.norm(dim=1), bank.read[name].norm(dim=1))
    for rows in control.write.values():
        torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), rtol=0, atol=1e-4)


def test_matrices_that_take_the_tokens_of_all_rows_in_one_dimension() -> None:
    """OPT's MLP does, and its directions read the same as those of a pass over one row."""
    model = zoo_model("opt")
    found = change_directions(torch.randn(32, 48), k=2, floor=0.0, name="model.decoder.layers.1.fc2.weight", seed=0)
    bank = Bank.of([found], "opt", k=2)
    rows = torch.tensor([[5, 9, 11, 7], [3, 8, 6, 12]])
    with torch.no_grad(), watched(model, bank) as columns:
        model(rows)
        together = columns.take()
        alone = []
        for row in rows:
            model(row[None])
            alone.append(columns.take()[0])
    assert together.shape == (2, 4, len(bank.names))
    torch.testing.assert_close(together, torch.stack(alone))
