"""A fix is saved and read back to the bit, and nothing else is read."""

import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from molehunt.errors import InvalidInput, UsageError
from molehunt.run import catalog as plugins
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.add import Add
from molehunt.steer.clip import Clip
from molehunt.steer.fix import Fix
from molehunt.steer.replace import Replace
from tiny_models import prompts, tiny_model

RNG = torch.Generator().manual_seed(0)
D = 32
GOLDEN = Path(__file__).parents[1] / "golden"


def rows(k: int) -> torch.Tensor:
    return torch.randn(k, D, generator=RNG)


def fix() -> Fix:
    low = torch.tensor([-0.1, -0.2])
    made = (
        Ablate(Site(0), rows(2), center=rows(1)[0]),
        Ablate(Site(1), rows(1), strength=0.5),
        Clip(Site(1), rows(2), lo=low, hi=low + 0.3),
        Add(Site(2), rows(1)[0], 2.0),
    )
    return Fix(interventions=made, description="four edits", d_model=D, n_layers=3, model="ab" * 32)


def test_what_is_read_back_edits_to_the_same_bits(tmp_path) -> None:
    before = fix()
    after = Fix.load(str(before.save(str(tmp_path / "fix.safetensors"))))
    acts = torch.randn(2, 5, D, generator=RNG)
    assert [type(one) for one in after.interventions] == [type(one) for one in before.interventions]
    for a, b in zip(before.interventions, after.interventions, strict=True):
        assert a.site == b.site and a(acts).equal(b(acts)) and not a(acts).equal(acts)
    assert (after.description, after.d_model, after.n_layers, after.model) == ("four edits", D, 3, "ab" * 32)
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(6, 6)))
    logits = []
    for one in (before, after):
        with torch.no_grad(), one.applied(model):
            logits.append(model(ids).logits)
    assert logits[0].equal(logits[1]) and not logits[0].equal(model(ids).logits)


def test_a_fix_for_another_model_is_refused() -> None:
    fix().refuse(3, D, "ab" * 32)
    fix().refuse(3, D)
    with pytest.raises(UsageError, match="3 blocks of width 32; the given one has 4 of 32"):
        fix().refuse(4, D)
    with pytest.raises(UsageError, match="another checkpoint"):
        fix().refuse(3, D, "cd" * 32)


def test_only_plain_interventions_are_saved(tmp_path) -> None:
    for one in (Replace(Site(0), rows(1)[None]), Add(Site(0), rows(1)[0], 1.0, gate=lambda acts: acts[..., 0] > 0)):
        with pytest.raises(UsageError, match="cannot be saved"):
            Fix(interventions=(one,), description="", d_model=D, n_layers=3).save(tmp_path / "fix.safetensors")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, eq=False)
class Halved:
    """An intervention of another package."""

    savable: ClassVar[bool] = True
    site: Site
    weight: torch.Tensor

    def __call__(self, acts: torch.Tensor) -> torch.Tensor:
        return 0.5 * acts * self.weight


def test_an_intervention_of_a_plugin_is_saved_once_it_says_that_it_can_be(tmp_path, monkeypatch) -> None:
    made = Fix(interventions=(Halved(Site(0), rows(1)[0]),), description="half", d_model=D, n_layers=3)
    with pytest.raises(UsageError, match="Halved cannot be saved"):
        made.save(tmp_path / "fix.safetensors")
    point = EntryPoint(name="halved", value=f"{__name__}:Halved", group="molehunt.interventions")
    monkeypatch.setattr(plugins, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    again = Fix.load(made.save(tmp_path / "fix.safetensors"))
    acts = torch.randn(2, 5, D, generator=RNG)
    assert again.interventions[0](acts).equal(made.interventions[0](acts))
    monkeypatch.undo()
    with pytest.raises(InvalidInput, match="no 'halved' here"):
        Fix.load(tmp_path / "fix.safetensors")


def test_a_fix_of_the_first_release_is_read() -> None:
    old = Fix.load(GOLDEN / "fix-v1.safetensors")
    assert old.description == "ablate 1 direction at L3.resid and every later site"
    assert (old.d_model, old.n_layers, (old.model or "")[:12]) == (128, 6, "d38264560814")
    assert [(type(one), one.site) for one in old.interventions] == [(Ablate, Site(layer)) for layer in (3, 4, 5)]


def header(one: dict, **facts: object) -> str:
    fields = {"description": "", "d_model": D, "n_layers": 3, "model": None, **facts}
    return json.dumps({"schema": 2, "interventions": [one], **fields})


@pytest.mark.parametrize(
    "written",
    [
        None,
        "no json",
        json.dumps({"schema": 99}),
        json.dumps({"schema": 1, "interventions": [], "words": "", "d_model": D, "n_layers": 3, "model": None}),
        json.dumps({"schema": 1, "interventions": [{"kind": "os", "site": "L0.resid"}], "words": ""}),
        json.dumps({"schema": 1, "interventions": [{"kind": "add", "site": "nowhere"}], "words": ""}),
        json.dumps({"schema": 1, "interventions": 3, "words": ""}),
        header({"kind": "add", "site": "L3.resid", "strength": 1.0}),
        header({"kind": "add", "site": "L0.resid", "strength": 1.0}, words="both names"),
        header({"kind": "add", "site": "L0.resid", "strength": float("inf")}),
        header({"kind": "add", "site": "L0.resid", "strength": 1.0}, d_model=D + 1),
        header({"kind": "add", "site": "L0.resid", "strength": 1.0}, d_model=10**15),
        header({"kind": "add", "site": "L0.resid", "strength": 1.0}, n_layers="many"),
        json.dumps([1]),
    ],
)
def test_other_files_are_refused(tmp_path, written) -> None:
    path = tmp_path / "fix.safetensors"
    save_file({"0.direction": torch.ones(D)}, path, None if written is None else {"molehunt_fix": written})
    with pytest.raises(InvalidInput, match="no fix of Molehunt's"):
        Fix.load(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(InvalidInput):
        Fix.load(path)
