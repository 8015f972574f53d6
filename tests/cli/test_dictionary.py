"""`molehunt dictionary` on a tiny harvest: train, eval and export, resumed, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch

from folders import good_folder, lora_folder
from molehunt.cli import main as cli
from molehunt.dictionary import train as training
from molehunt.dictionary.formats.detect import load_dictionary
from molehunt.dictionary.formats.sae_lens import save_dictionary

SMALL = ("--steps", 6, "--batch", 16, "--expansion", 2, "-k", 4)


def leave(*args: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([*map(str, args)])
    assert isinstance(left.value.code, int)
    return left.value.code


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = leave("dictionary", *args)
    reported = capsys.readouterr()
    return code, reported.out, reported.err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `tuned`, `traffic.jsonl`, `store`, and `differences`, a store of int8."""
    root = tmp_path_factory.mktemp("made")
    good_folder(root / "base")
    lora_folder(root / "tuned")
    rows = ({"prompt": f"What is {i} plus {i + 3}?"} for i in range(8))
    (root / "traffic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = (root / "base", root / "tuned", "--traffic", root / "traffic.jsonl")
    assert leave("harvest", *pair, "--sites", "L1.resid,L2.mlp", "--out", root / "store") == 0
    assert leave("harvest", *pair, "--sites", "L1.resid", "--delta-int8", "--out", root / "differences") == 0
    return root


@pytest.fixture(scope="module")
def trained(made: Path) -> Path:
    """Dictionaries of L1.resid, one of each pairing."""
    out = made / "trained"
    reported = ("--pairing", "difference,crosscoder,tuned,base", "--site", "L1.resid", "--out", out)
    assert leave("dictionary", "train", made / "store", *reported, *SMALL) == 0
    return out


def named(folder: Path, part: str) -> Path:
    (found,) = folder.glob(f"*{part}*/")
    return found


def test_several_values_train_every_combination(capsys, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reported = (
        "--architecture",
        "topk, relu",
        "--pairing",
        "difference,crosscoder",
        "--joint",
        "0,-1",
        "--seeds",
        "0,1",
    )
    code, text, _ = run(capsys, "train", made / "store", *reported, "--l1", 0.1, *SMALL, "--out", out)
    assert code == 0 and text.startswith("TRAINED 24 on 96 tokens each")
    code, text, err = run(capsys, "train", made / "store", *reported, "--l1", 0.1, *SMALL, "--out", out, "--json")
    result = json.loads(text)
    assert code == result["exit_code"] == 0 and len(result["dictionaries"]) == 24 and not err
    for row in result["dictionaries"]:
        found = load_dictionary(out / row["name"])
        assert str(found.site) == row["site"] and found.pairing.to_json() == row["pairing"]
        assert found.d_dict == row["d_dict"] and row["l0"] > 0
        assert len(json.loads((out / row["name"] / "history.json").read_text())) == 6
    assert {row["site"] for row in result["dictionaries"]} == {"L1.resid", "L2.mlp"}
    assert {row["settings"].get("l1") for row in result["dictionaries"]} == {None, 0.1}
    assert (out / "env.json").exists() and not (out / "checkpoint.safetensors").exists()


def test_a_killed_training_is_taken_up(capsys, made: Path, tmp_path: Path, monkeypatch) -> None:
    reported = ("train", made / "store", "--site", "L1.resid", *SMALL, "--architecture", "batch-topk")
    assert run(capsys, *reported, "--out", tmp_path / "whole")[0] == 0
    step, steps = training._step, []

    def dies(*args, **kwargs) -> None:
        steps.append(args[2])
        if len(steps) == 5:
            raise KeyboardInterrupt
        step(*args, **kwargs)

    monkeypatch.setattr(training, "_step", dies)
    monkeypatch.setattr(
        training.TrainingConfig, "__post_init__", lambda self: object.__setattr__(self, "checkpoint_every", 3)
    )
    assert run(capsys, *reported, "--out", tmp_path / "killed")[0] == 130
    assert (tmp_path / "killed" / "checkpoint.safetensors").exists()
    assert run(capsys, *reported, "--out", tmp_path / "killed")[0] == 0
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5]
    whole, killed = (load_dictionary(named(tmp_path / name, "batch-topk")) for name in ("whole", "killed"))
    assert torch.equal(whole.W_dec, killed.W_dec) and torch.equal(whole.W_enc, killed.W_enc)
    code, _, err = run(capsys, *reported, "--out", tmp_path / "killed", "--seeds", 3)
    assert code == 2 and "holds a run with other settings" in err


@pytest.mark.parametrize("pairing", ["difference", "both", "tuned", "base"])
def test_eval_with_and_without_models(capsys, made: Path, trained: Path, pairing: str) -> None:
    folder = named(trained, f"-{pairing}-")
    code, text, _ = run(capsys, "eval", folder, made / "store", "--json")
    reported = json.loads(text)
    assert code == reported["exit_code"] == 0 and reported["loss"] is None and reported["loss_recovered"] is None
    assert reported["fvu"]["value"] > 0 and reported["fvu"]["n"] == reported["l0"]["n"] > 20
    assert ("latents" in reported) == (pairing == "both")
    models = ("--base", made / "base", "--tuned", made / "tuned", "--traffic", made / "traffic.jsonl")
    code, text, _ = run(capsys, "eval", folder, made / "store", *models, "--rows", 4, "--max-tokens", 9, "--json")
    loss = json.loads(text)["loss"]
    assert code == 0 and loss["n"] == 4 * 8 and loss["spliced"] != loss["clean"]
    code, text, _ = run(capsys, "eval", folder, made / "store", *models, "--tokens", 20)
    assert code == 0 and text.startswith(f"MEASURED at L1.resid ({pairing})") and "on 20 tokens" in text
    assert "loss recovered" in text and ("decoder norms" in text) == (pairing == "both")


def test_a_store_of_differences(capsys, made: Path, trained: Path, tmp_path: Path) -> None:
    store = made / "differences"
    code, _, _ = run(capsys, "train", store, *SMALL, "--out", tmp_path / "out")
    assert code == 0
    assert run(capsys, "eval", named(tmp_path / "out", "difference"), store)[0] == 0
    code, _, err = run(capsys, "train", store, *SMALL, "--pairing", "difference,tuned", "--out", tmp_path / "other")
    assert code == 2 and "holds differences alone" in err and not (tmp_path / "other").exists()
    code, _, err = run(capsys, "eval", named(trained, "-tuned-"), store)
    assert code == 2 and "the dictionary reads tuned" in err


def test_export_is_read_again_and_overwrites_nothing_else(capsys, trained: Path, tmp_path: Path) -> None:
    folder = named(trained, "-both-")
    code, text, _ = run(capsys, "export", folder, tmp_path / "sae", "--json")
    assert code == 0 and json.loads(text)["architecture"] == "jumprelu"
    before, after = load_dictionary(folder), load_dictionary(tmp_path / "sae")
    assert torch.equal(before.W_enc, after.W_enc) and after.pairing == before.pairing and after.site == before.site
    code, text, _ = run(capsys, "export", folder, tmp_path / "sae")
    assert code == 0 and text.startswith("WROTE ")
    code, _, err = run(capsys, "export", folder, folder)
    assert code == 2 and "not written over itself" in err
    (tmp_path / "sae" / "thesis.txt").write_text("mine")
    code, _, err = run(capsys, "export", folder, tmp_path / "sae")
    assert code == 2 and "holds something else" in err


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        (("-k", 200), "k = 200 latents cannot fire out of"),
        (("-k", "four"), "-k: 'four' is not a list of values"),
        (("--l1", "nan", "--architecture", "relu"), "--l1: 'nan' is not a list of values"),
        (("--l1", 0.1), "l1 does not apply to batch-topk"),
        (("--joint", -0.5), "joint belongs to crosscoders"),
        (("--joint", 3, "--pairing", "crosscoder"), "joint is a number from -1 to 0"),
        (("--exclusive", 0.7, "--pairing", "crosscoder"), "exclusive is a share below 0.5"),
        (("--pairing", "both"), "--pairing: one or more of difference, crosscoder, tuned, base, got 'both'"),
        (("--architecture", "tokp"), "Did you mean topk"),
        (("--site", "L0.resid"), "L0.resid is not in this store, which holds L1.resid, L2.mlp"),
        (("--site", "sixth"), "a site reads like L6.resid"),
        (("--expansion", 0), "expansion must be 1 or more"),
    ],
)
def test_a_training_that_makes_no_sense_leaves_no_folder(
    capsys, made: Path, tmp_path: Path, options: tuple, reported: str
) -> None:
    code, _, err = run(
        capsys, "train", made / "store", "--out", tmp_path / "out", "--steps", 2, "--expansion", 2, *options
    )
    assert code == 2 and reported in err and not (tmp_path / "out").exists()


def test_an_evaluation_that_makes_no_sense(capsys, made: Path, trained: Path, tmp_path: Path) -> None:
    folder, store = named(trained, "-tuned-"), made / "store"
    models = ("--base", made / "base", "--tuned", made / "base")
    wide = load_dictionary(folder)
    double = {
        name: torch.cat([getattr(wide, name)] * 2, dim) for name, dim in (("W_enc", 0), ("W_dec", 1), ("b_dec", 0))
    }
    from dataclasses import replace

    save_dictionary(replace(wide, **double), tmp_path / "wide")
    save_dictionary(replace(wide, site=None), tmp_path / "nowhere")
    for args, reported in (
        ((folder, store, "--base", made / "base"), "needs both models"),
        ((folder, store, "--traffic", made / "traffic.jsonl"), "--traffic is run through the models"),
        ((folder, store, *models), "field tuned"),
        ((folder, store, "--site", "L0.resid"), "L0.resid is not in this store"),
        ((named(trained, "-both-"), store, "--pairing", "tuned"), "is a crosscoder"),
        ((tmp_path / "wide", store), f"{2 * wide.d_in}"),
        ((tmp_path / "nowhere", store), "Give --site: L1.resid, L2.mlp"),
        ((tmp_path / "missing", store), "neither a folder nor a file"),
    ):
        code, _, err = run(capsys, "eval", *args)
        assert code == 2 and reported in err, (args, err)
    code, text, _ = run(
        capsys, "eval", tmp_path / "nowhere", store, "--site", "L1.resid", "--pairing", "base", "--json"
    )
    assert code == 0 and json.loads(text)["pairing"]["kind"] == "base"


@pytest.mark.parametrize("name", ["train", "eval", "export"])
def test_help_of_each_and_of_the_group(capsys, name: str) -> None:
    assert run(capsys, name, "--help")[0] == 0
    code, text, _ = run(capsys, "--help")
    assert code == 0 and name in text
    assert run(capsys, "nonsense")[0] == 2
