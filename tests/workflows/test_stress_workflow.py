"""`molehunt.stress`: a loaded pair, lists and objects give what folders and files give."""

import hashlib
import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch

import molehunt as mh
from folders import good_folder
from molehunt.cli.main import main
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.sae_lens import save_dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.errors import InvalidInput, UsageError
from molehunt.run.progress import silent
from molehunt.steer.add import Add
from molehunt.steer.vector import VectorFacts
from molehunt.stress.certificate import digest
from molehunt.stress.evaluation.config import StressConfig, StressSettings
from molehunt.workflows.audit import AuditResult
from molehunt.workflows.result import WorkflowResult
from molehunt.workflows.steer import SteerResult
from molehunt.workflows.stress import StressResult
from molehunt.workflows.stress_defence import OpenedDefence, defence_request, open_defence
from random_dictionaries import dictionary_of
from tiny_models import D_MODEL, N_LAYERS

PROMPTS = [f"Which number follows {i}{'?' * (i % 3)}" for i in range(16)]
CLEAN = [f"Name {i} things." for i in range(8)]
TOKENS = 2
SMALL: StressSettings = {"rows": 6, "steps": 6, "levels": 2, "draws": 10, "max_new_tokens": TOKENS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return good_folder(root / "base"), good_folder(root / "tuned", seed=3)


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> mh.ModelPair:
    return mh.ModelPair.load(*folders)


@pytest.fixture(scope="module")
def match(pair: mh.ModelPair) -> list[str]:
    """What the model answers by itself: the behaviour of these tests."""
    return sorted({answer for answer in pair.generate(PROMPTS, max_new_tokens=TOKENS) if answer})


def direction() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)), dim=0)


def some_fix() -> mh.Fix:
    return mh.Fix(
        interventions=(Add(mh.Site(1), direction(), 40.0),),
        description="add 1 at L1.resid",
        d_model=D_MODEL,
        n_layers=N_LAYERS,
    )


def some_dictionary() -> Dictionary:
    return replace(dictionary_of("jumprelu"), site=mh.Site(1), center=False)


@pytest.fixture(scope="module")
def result(pair: mh.ModelPair, match: list[str]) -> StressResult:
    return mh.stress(pair, fix=some_fix(), prompts=PROMPTS, match=match, clean=CLEAN, **SMALL)


def without_command(certificate: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in certificate.items() if key not in ("command", "sha256")}


def test_a_loaded_pair_and_lists_give_what_the_command_gives(
    folders: tuple[Path, Path],
    pair: mh.ModelPair,
    match: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, prompts in (("bad", PROMPTS), ("clean", CLEAN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    phrases = [part for phrase in match for part in ("--match", phrase)]
    files = ["--prompts", tmp_path / "bad.jsonl", "--clean", tmp_path / "clean.jsonl", "--out", tmp_path / "out"]
    fix = [
        "--fix",
        some_fix().save(tmp_path / "fix.safetensors"),
        "--rows",
        6,
        "--steps",
        3,
        "--max-new-tokens",
        TOKENS,
    ]
    arguments = [str(one) for one in ("stress", *folders, *phrases, *files, *fix)]
    monkeypatch.setattr("sys.argv", ["molehunt", *arguments])
    with pytest.raises(SystemExit) as left:
        main(arguments)
    printed = capsys.readouterr().out
    from_files = json.loads((tmp_path / "out" / "certificate.json").read_text())
    found = mh.stress(
        pair, fix=some_fix(), prompts=PROMPTS, match=match, clean=CLEAN, rows=6, steps=3, max_new_tokens=TOKENS
    )
    assert without_command(json.loads(json.dumps(found.to_dict()))) == without_command(from_files)
    assert from_files["command"] == shlex.join(["molehunt", *arguments]) and found.to_dict()["command"] is None
    assert printed == found.summary() + "\n"
    assert left.value.code == (found.verdict == "RECOVERABLE")


def test_the_result_keeps_its_contract(result: StressResult, tmp_path: Path) -> None:
    assert isinstance(result, WorkflowResult)
    page = result.save(tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "stress.html"
    certificate = json.loads((page.parent / "certificate.json").read_text())
    assert certificate == result.to_dict() and certificate["sha256"] == digest(certificate)
    assert certificate["schema"] == 2 and certificate["verdict"] == result.verdict
    assert "<pre></pre>" not in page.read_text()  # no command line was given
    lines = result.summary().splitlines()
    assert lines[0] == f"{result.verdict}  (add 1 at L1.resid)"
    rows = [*result.study.arms, *result.study.controls.values()]
    assert [line[:24].strip() for line in lines[3 : 3 + len(rows)]] == [row.name for row in rows]


def test_what_a_notebook_shows_is_a_table_and_runs_nothing(result: StressResult) -> None:
    hostile = replace(result, certificate={**result.certificate, "fix": "<script>alert(1)</script>"})
    shown = hostile._repr_html_()  # pyright: ignore[reportPrivateUsage]
    rows = len(result.study.arms) + len(result.study.controls)
    assert shown.count("<tr>") == 1 + rows and "<td>" in shown
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_a_fix_in_memory_is_hashed_as_its_file(result: StressResult, tmp_path: Path) -> None:
    file = some_fix().save(tmp_path / "fix.safetensors")
    assert result.to_dict()["fix_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_steering_vector_is_subtracted(pair: mh.ModelPair, match: list[str], result: StressResult) -> None:
    facts = VectorFacts(method="difference in means", n_layers=N_LAYERS, d_model=D_MODEL)
    vector = mh.SteeringVector({1: -40.0 * direction()}, facts)
    found = mh.stress(pair, fix=vector, prompts=PROMPTS, match=match, clean=CLEAN, **SMALL)
    assert found.to_dict()["fix"] == "subtract a vector (difference in means) at L1.resid"
    assert found.study.valid.defended == result.study.valid.defended  # -1 · (-40 · d) is the edit of `some_fix`
    with pytest.raises(UsageError, match="for a model of"):
        other = mh.SteeringVector({1: torch.ones(8)}, replace(facts, d_model=8))
        mh.stress(pair, fix=other, prompts=PROMPTS, match=match)


def some_vector() -> mh.SteeringVector:
    facts = VectorFacts(method="difference in means", n_layers=N_LAYERS, d_model=D_MODEL)
    return mh.SteeringVector({1: -40.0 * direction()}, facts)


def test_a_vector_may_be_a_file_in_python_and_on_the_command_line(
    folders: tuple[Path, Path], pair: mh.ModelPair, match: list[str], result: StressResult, tmp_path: Path
) -> None:
    file = some_vector().save(tmp_path / "vector.safetensors")
    found = mh.stress(pair, fix=file, prompts=PROMPTS, match=match, clean=CLEAN, **SMALL)
    assert found.study.valid.defended == result.study.valid.defended
    assert found.to_dict()["fix_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in PROMPTS))
    options = [
        "--prompts",
        tmp_path / "bad.jsonl",
        "--fix",
        file,
        "--rows",
        6,
        "--steps",
        3,
        "--max-new-tokens",
        TOKENS,
    ]
    options += [part for phrase in match for part in ("--match", phrase)]
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in ("stress", *folders, *options, "--out", tmp_path / "out")])
    assert left.value.code in (0, 1)
    made = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert made["fix"] == "subtract a vector (difference in means) at L1.resid"


def test_results_of_steer_and_audit_stand_for_their_fix(
    pair: mh.ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(fix: Any) -> OpenedDefence:
        return open_defence(defence_request(fix, None, None, "set", 0, None), pair, "a" * 64, lambda *given: [])

    acts = torch.randn(1, 3, D_MODEL)
    steered = SteerResult(pair=pair, vector=some_vector(), strength=-2.0, operator="add", scope="all")
    for one, description in (
        (steered, "subtract 2 times a vector"),
        (replace(steered, strength=-1), "subtract a vector"),
        (replace(steered, operator="ablate", strength=1), "ablate 100% of a vector"),
    ):
        found = opened(one)
        (expected,), (edit,) = one.interventions(), found.defence.edits
        assert edit(acts).equal(expected(acts)) and found.about["fix"].startswith(description)
    with pytest.raises(UsageError, match="steers only scope 'last'"):
        opened(replace(steered, scope="last"))

    file = some_fix().save(tmp_path / "fix.safetensors")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # of an audit only its file is read
    parts: dict[str, Any] = {"audit": SimpleNamespace(fix=file), "report": SimpleNamespace(verdict="FLAGGED-CAUSAL")}
    assert opened(AuditResult(**parts)).about == opened(file).about
    with pytest.raises(UsageError, match=r"this audit \(FLAGGED-CAUSAL\) confirmed no fix"):
        opened(AuditResult(**{**parts, "audit": SimpleNamespace(fix=None)}))


def test_a_result_is_printed_in_one_line(result: StressResult) -> None:
    assert repr(result) == f"StressResult({result.verdict}  (add 1 at L1.resid))"


def test_a_dictionary_in_memory_is_that_of_its_folder(pair: mh.ModelPair, match: list[str], tmp_path: Path) -> None:
    save_dictionary(some_dictionary(), tmp_path / "sae")
    by_object, by_folder = (
        mh.stress(
            pair, dictionary=given, features=features, value=6, prompts=PROMPTS, match=match, clean=CLEAN, **SMALL
        ).to_dict()
        for given, features in ((some_dictionary(), [3, 8, 11]), (tmp_path / "sae", "3,8, 11"))
    )
    assert by_object == by_folder and by_object["latents"] == [3, 8, 11]
    with pytest.raises(UsageError, match="for a width of"):
        narrow = Dictionary(
            W_enc=torch.ones(8, 4), b_enc=torch.ones(4), W_dec=torch.ones(4, 8), b_dec=torch.ones(8),
            nonlinearity=ReLUActivation(), site=mh.Site(1),
        )  # fmt: skip
        mh.stress(pair, dictionary=narrow, features=[0], prompts=PROMPTS, match=match)


def test_fewer_latents_than_requested_are_reported(pair: mh.ModelPair, match: list[str]) -> None:
    made = some_dictionary()
    found = mh.stress(
        pair,
        dictionary=made,
        features=f"best:{made.d_dict}",
        value=60,
        prompts=PROMPTS,
        match=match,
        clean=CLEAN,
        **SMALL,
    )
    n = len(found.to_dict()["latents"])
    (note,) = found.notes
    assert 0 < n < made.d_dict and note.startswith(f"{n} latents have a positive attribution")
    assert found.summary().endswith(note) and note in found._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert found.to_dict()["prompts"]["given"] == len(PROMPTS) // 2


def test_settings_are_the_fields_of_the_config() -> None:
    annotated = {field.name: field.type for field in fields(StressConfig)}
    assert annotated == StressSettings.__annotations__
    with pytest.raises(
        UsageError, match=r"no option 'max_length'\.\nSettings of the attacks are rows, positions, max_norm"
    ):
        mh.stress("a", "b", prompts=["x"], match="y", fix="f", max_length=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("options", "kind", "wrong"),
    [
        ({"prompts": [], "match": "a", "fix": "f"}, InvalidInput, "the list of prompts has no rows"),
        ({"prompts": ["x"], "fix": "f"}, UsageError, "Say how the behaviour is known"),
        ({"prompts": ["x"], "match": ["a", ""], "fix": "f"}, UsageError, "no phrase is empty"),
        ({"prompts": ["x"], "match": "a"}, UsageError, "or --fix FILE"),
        ({"prompts": ["x"], "match": "a", "fix": "f", "rows": 5}, UsageError, "rows is 5: fewer than 6"),
        ({"prompts": ["x"], "match": "a", "fix": "f", "row": 6}, UsageError, "no option 'row'"),
        ({"prompts": ["x"], "match": "a", "fix": "f", "features": [1]}, UsageError, "were both given"),
        ({"prompts": ["x"], "match": "a", "fix": "f"}, UsageError, "f is not a file"),
    ],
)
def test_requests_that_cannot_be_met(
    pair: mh.ModelPair, options: dict[str, Any], kind: type[Exception], wrong: str
) -> None:
    with pytest.raises(kind, match=wrong):
        mh.stress(pair, **options, track=silent)
