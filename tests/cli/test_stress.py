"""`molehunt stress` on whole folders: dictionaries as SAELens and Gemma Scope write them, and the fix of an audit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from folders import good_folder
from molehunt.cli.main import main
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.sae_lens import save_dictionary
from molehunt.dictionary.nonlinearity import JumpReLUActivation
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.pair import ModelPair
from molehunt.report.stress_page import SUFFIXES
from molehunt.report.stress_table import share_text
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.fix import Fix
from molehunt.stress.attacks.discrete_suffix import DiscreteConfig
from molehunt.stress.attacks.soft_suffix import SoftConfig
from molehunt.stress.certificate import digest
from molehunt.traffic.chat import prompt_ids
from molehunt.workflows import stress as workflow
from random_dictionaries import dictionary_of
from tiny_models import D_MODEL, N_LAYERS

pytestmark = pytest.mark.slow

PROMPTS = [f"Which number follows {i}{'?' * (i % 3)}" for i in range(16)]
CLEAN = [f"Name {i} things." for i in range(8)]
TOKENS = 2


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def written(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def made() -> Dictionary:
    return replace(dictionary_of("jumprelu"), site=Site(1), center=False)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stressed")
    good_folder(root / "base")
    good_folder(root / "tuned", seed=3)
    written(root / "bad.jsonl", PROMPTS)
    written(root / "clean.jsonl", CLEAN)
    return root


@pytest.fixture(scope="module")
def match(here: Path) -> list[str]:
    """What the model answers by itself: the behaviour of these tests."""
    pair = ModelPair.load(here / "base", here / "tuned")
    with pair.tuned_model() as model:
        rows = [prompt_ids(pair.tokenizer, prompt) for prompt in PROMPTS]
        decoded = generate(model, pair.tokenizer, rows, max_new_tokens=TOKENS)
        stops = stop_ids(model, pair.tokenizer)
    answers = {str(pair.tokenizer.decode(before_stop(one, stops), skip_special_tokens=True)) for one in decoded}
    return [part for answer in sorted(answers) if answer for part in ("--match", answer)]


def stressed(here: Path, match: list[str], out: Path, *fix: object) -> int:
    models = ("stress", here / "base", here / "tuned", *match, "--prompts", here / "bad.jsonl")
    short = ("--clean", here / "clean.jsonl", "--rows", 6, "--steps", 6, "--max-new-tokens", TOKENS, "--out", out)
    return call(*models, *short, *fix)


def gemma_scope(folder: Path, dictionary: Dictionary) -> Path:
    assert isinstance(dictionary.nonlinearity, JumpReLUActivation)
    place = folder / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    np.savez(
        place / "params.npz",
        W_enc=dictionary.W_enc.numpy(),
        W_dec=dictionary.W_dec.numpy(),
        b_enc=dictionary.b_enc.numpy(),
        b_dec=dictionary.b_dec.numpy(),
        threshold=dictionary.nonlinearity.threshold.numpy(),
    )
    return place


@pytest.mark.parametrize("family", ["Gemma Scope", "SAELens", "sae-lens itself"])
def test_dictionaries_from_folders(here: Path, match: list[str], tmp_path: Path, family: str) -> None:
    if family == "Gemma Scope":
        folder = gemma_scope(tmp_path, made())
    else:
        folder = tmp_path / "sae"
        save_dictionary(made(), folder)
        if family == "sae-lens itself":
            lens = pytest.importorskip("sae_lens")
            lens.SAE.load_from_disk(folder).save_model(tmp_path / "theirs")
            folder = tmp_path / "theirs"
    out = tmp_path / "out"
    clamp = ("--dictionary", folder, "--features", "3,8, 11", "--value", 6)
    code = stressed(here, match, out, *clamp)
    payload = json.loads((out / "certificate.json").read_text())
    assert code == (payload["verdict"] == "RECOVERABLE")
    assert payload["latents"] == [3, 8, 11] and payload["site"] == "L1.resid"
    assert [arm["name"] for arm in payload["arms"]] == ["free", "paper", "exact"]
    assert payload["arms"][-1]["drift"]["pre_activation"]["max"] <= 1e-5
    assert payload["zero_perturbation"]["estimate"] == 0
    assert set(payload["controls"]) == {"random target", "undefended", "random perturbation", "universal perturbation"}
    assert payload["sha256"] == digest(payload) != digest({**payload, "verdict": "safe"})
    page = (out / "stress.html").read_text()
    assert payload["verdict"] in page and "Content-Security-Policy" in page


def some_fix(folder: Path) -> Path:
    direction = torch.nn.functional.normalize(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)), dim=0)
    fix = Fix(
        interventions=(Add(Site(1), direction, 40.0),),
        description="add 1 at L1.resid",
        d_model=D_MODEL,
        n_layers=N_LAYERS,
    )
    return fix.save(folder / "fix.safetensors")


def test_the_fix_of_an_audit(here: Path, match: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stressed(here, match, tmp_path, "--fix", some_fix(tmp_path), "--json")
    payload = json.loads(capsys.readouterr().out)
    assert [arm["name"] for arm in payload["arms"]] == ["free", "exact"]
    assert payload["fix"] == "add 1 at L1.resid"
    assert payload["arms"][-1]["drift"]["largest"]["max"] <= 1e-4
    assert payload["inputs"] == [] and payload["config"]["soft"] is payload["config"]["discrete"] is None
    assert "soft suffix" not in (tmp_path / "stress.html").read_text()


def test_suffixes_stand_in_every_output(
    here: Path, match: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, discrete = SoftConfig(tokens=3, steps=4), DiscreteConfig(tokens=3, steps=2, candidates=4)
    monkeypatch.setattr(workflow, "SoftConfig", lambda: soft)
    monkeypatch.setattr(workflow, "DiscreteConfig", lambda: discrete)
    stressed(here, match, tmp_path / "out", "--fix", some_fix(tmp_path), "--suffixes")
    said = capsys.readouterr().out
    payload = json.loads((tmp_path / "out" / "certificate.json").read_text())
    page = (tmp_path / "out" / "stress.html").read_text()
    assert [one["name"] for one in payload["inputs"]] == ["soft suffix", "discrete suffix"]
    assert payload["config"]["soft"]["tokens"] == payload["config"]["discrete"]["tokens"] == 3
    for one in payload["inputs"]:
        assert one["recovered"]["n"] == one["random_target"]["n"] == payload["prompts"]["attacked"]
        assert f"{one['name']:<24}{share_text(one['recovered']):>20}" in said
        assert f"{'  random target':<24}{share_text(one['random_target']):>20}" in said
        assert SUFFIXES[one["name"]] in page


@pytest.mark.parametrize(
    ("features", "more", "code", "wrong"),
    [
        ("", (), 2, "--features takes the numbers"),
        ("3", ("--match", ""), 2, "no phrase is empty"),
        ("3,x", (), 2, "--features takes the numbers"),
        ("3,99", (), 2, "no latent 99"),
        ("3,3", (), 2, "given twice"),
        ("3", ("--layer", 0), 2, "is of L1.resid, and --layer says L0"),
        ("3", ("--layer", 7), 2, "is of L1.resid, and --layer says L7"),
        ("3", ("--mode", "scale", "--value", 1), 3, "changes none of 16 answers"),
        ("3", ("--fix", "nothing.safetensors"), 2, "were both given"),
    ],
)
def test_bad_input(
    here: Path,
    match: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    features: str,
    more: tuple[object, ...],
    code: int,
    wrong: str,
) -> None:
    save_dictionary(made(), tmp_path / "sae")
    out = tmp_path / "out"
    assert stressed(here, match, out, "--dictionary", tmp_path / "sae", "--features", features, *more) == code
    assert wrong in capsys.readouterr().err
    assert not (out / "certificate.json").exists()


def test_prompts_from_a_table(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "advbench.csv", tmp_path / "out"
    save_dictionary(made(), tmp_path / "sae")
    clamp = ("--dictionary", tmp_path / "sae", "--features", 3)
    models = ("stress", here / "base", here / "tuned", "--match", "no model says this", "--prompts", table)
    more = ("--clean", here / "clean.jsonl", "--max-new-tokens", TOKENS, "--out", out)
    table.write_text("goal,target\n" + "".join(f'"{prompt}","Sure, here"\n' for prompt in PROMPTS[:5]))
    assert call(*models, *clamp, *more) == 3
    assert "None of 5 prompts shows" in capsys.readouterr().err
    table.write_text("colour\nSing\n")
    assert call(*models, *clamp, *more) == 4
    assert "begins with the columns colour" in capsys.readouterr().err
    assert not (out / "certificate.json").exists()


def test_a_behaviour_that_nobody_shows(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dictionary(made(), tmp_path / "sae")
    clamp = ("--dictionary", tmp_path / "sae", "--features", 3)
    assert stressed(here, ["--match", "no model says this"], tmp_path / "out", *clamp) == 3
    err = capsys.readouterr().err
    assert "None of 16 prompts shows" in err and "The first answer is '" in err and "Upper and lower case count" in err


def test_latents_are_selected_on_prompts_that_are_not_attacked(here: Path, match: list[str], tmp_path: Path) -> None:
    save_dictionary(made(), tmp_path / "sae")
    out = tmp_path / "out"
    stressed(here, match, out, "--dictionary", tmp_path / "sae", "--features", "best:2", "--value", 60)
    payload = json.loads((out / "certificate.json").read_text())
    assert len(payload["latents"]) == 2 and payload["prompts"]["given"] == len(PROMPTS) // 2


def test_a_behaviour_known_by_excluded_phrases(here: Path, match: list[str], tmp_path: Path) -> None:
    """Every answer but the empty one lacks a phrase that no model says; none lacks its own."""
    save_dictionary(made(), tmp_path / "sae")
    clamp = ("--dictionary", tmp_path / "sae", "--features", 3)
    phrases = [phrase for phrase in match if phrase != "--match"]
    assert stressed(here, [part for phrase in phrases for part in ("--exclude", phrase)], tmp_path / "out", *clamp) == 3
    assert stressed(here, [], tmp_path / "out", *clamp) == 2
    code = stressed(here, [*match, "--exclude", "no model says this"], tmp_path / "out", *clamp, "--value", 6)
    assert code in (0, 1)
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["exclude"] == ["no model says this"]


def test_the_output_is_checked_before_the_work(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "file", [])
    clamp = ("--dictionary", tmp_path / "nothing", "--features", 3)
    assert stressed(here, ["--match", "a"], file, *clamp) == 2
    assert "cannot be made a folder" in capsys.readouterr().err
    models = ("stress", here / "base", here / "tuned", "--match", "a", *clamp, "--out", tmp_path / "out")
    assert call(*models, "--prompts", file) == 4
    assert "has no rows" in capsys.readouterr().err


def test_a_release_of_another_stream(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = gemma_scope(tmp_path, made())
    other = tmp_path / "gemma-scope-2b-pt-mlp" / place.relative_to(place.parents[2])
    other.parent.mkdir(parents=True)
    place.rename(other)
    clamp = ("--dictionary", other, "--features", 3, "--layer", 1)
    assert stressed(here, ["--match", "a"], tmp_path / "out", *clamp) == 2
    assert "is of gemma-scope-2b-pt-mlp" in capsys.readouterr().err
