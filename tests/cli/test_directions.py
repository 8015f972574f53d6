"""`molehunt directions` on pairs written here: text, JSON, files left behind, exit codes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from molehunt.cli.main import main

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def write(folder: Path, **changed: torch.Tensor) -> Path:
    rng = torch.Generator().manual_seed(0)
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    tensors = {f"model.layers.0.{part}.weight": 0.1 * torch.randn(12, 12, generator=rng) for part in parts}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    tensors |= {f"model.{norm}.weight": torch.ones(12) for norm in norms}
    tensors["model.embed_tokens.weight"] = torch.randn(20, 12, generator=rng)
    for key, change in changed.items():
        name = {"o": O_PROJ, "q": Q_PROJ}[key]
        tensors[name] = tensors[name] + change
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    config |= {"hidden_size": 12, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 20}
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["directions", *map(str, args)])
    printed = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, printed.out, printed.err


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    change = torch.zeros(12, 12)
    change[3, 4], change[5, 6] = 2.0, 1.0
    return write(tmp_path / "tuned", o=change, q=change)


def test_text_names_the_matrix_and_accuses_nobody(capsys: pytest.CaptureFixture[str], base: Path, tuned: Path) -> None:
    code, out, _ = run(capsys, base, tuned)
    assert code == 0
    assert out.startswith("DIRECTIONS FOUND: 2 of 7 matrices")
    assert f"{O_PROJ} " in out and Q_PROJ not in out
    assert "accuse nobody" in out


def test_k_all_matrices_and_json(capsys: pytest.CaptureFixture[str], base: Path, tuned: Path) -> None:
    code, out, _ = run(capsys, base, tuned, "--json", "-k", 1, "--seed", 5)
    payload = json.loads(out)
    assert code == 0 and payload["exit_code"] == 0 and payload["k"] == 1 and payload["seed"] == 5
    rows = {row["tensor"]: row for row in payload["matrices"]}
    assert rows[O_PROJ]["strengths"] == pytest.approx([2.0], rel=1e-4)
    assert "share" in rows[O_PROJ] and "share" not in rows[Q_PROJ]
    _, out, _ = run(capsys, base, tuned, "--json", "--all-matrices")
    rows = {row["tensor"]: row for row in json.loads(out)["matrices"]}
    assert rows[Q_PROJ]["share"] == pytest.approx([0.8, 0.2], rel=1e-4)


def test_an_empty_table_says_which_option_fills_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base: Path, tuned: Path
) -> None:
    only_q = write(tmp_path / "only-q", q=torch.eye(12))
    assert "Only q changed along directions: give --all-matrices to list them." in run(capsys, base, only_q)[1]
    assert "--all-matrices to list" not in run(capsys, base, only_q, "--all-matrices")[1]
    assert "--all-matrices to list" not in run(capsys, base, tuned)[1]


def test_out_keeps_vectors_and_is_resumed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base: Path, tuned: Path
) -> None:
    out = tmp_path / "run"
    code, first, _ = run(capsys, base, tuned, "--out", out)
    vectors = load_file(out / "directions.safetensors")
    assert code == 0 and vectors[f"{O_PROJ}.write"].argmax(dim=1).tolist() == [3, 5]
    assert json.loads((out / "directions.json").read_text())["outcome"] == "DIRECTIONS FOUND"
    assert (out / "env.json").exists() and (out / "config.json").exists()
    finished = {unit: unit.stat().st_mtime_ns for unit in (out / "units").iterdir()}
    assert len(finished) == 11
    assert run(capsys, base, tuned, "--out", out) == (0, first, "")
    assert {unit: unit.stat().st_mtime_ns for unit in (out / "units").iterdir()} == finished
    assert run(capsys, base, tuned, "--out", out, "-k", 2)[0] == 2  # the folder holds another run


def test_weights_with_an_adapter_beside_them_are_read_when_that_is_said(
    capsys: pytest.CaptureFixture[str], base: Path, tuned: Path
) -> None:
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]}
    (tuned / "adapter_config.json").write_text(json.dumps(settings))
    factors = {
        f"base_model.model.{O_PROJ[:-7]}.lora_{x}.weight": torch.ones(s)
        for x, s in {"A": (1, 12), "B": (12, 1)}.items()
    }
    save_file(factors, tuned / "adapter_model.safetensors")
    code, _, err = run(capsys, base, tuned)
    assert code == 2 and "--no-adapter" in err
    assert run(capsys, base, tuned, "--no-adapter")[0] == 0
    code, _, err = run(capsys, base, tuned, "--adapter")
    assert code == 2 and "a folder of its own" in err


def test_exit_codes(capsys: pytest.CaptureFixture[str], tmp_path: Path, base: Path) -> None:
    code, out, _ = run(capsys, base, base)
    assert code == 0 and out.startswith("NO FINDING")
    nan = torch.zeros(12, 12)
    nan[0, 0] = float("nan")
    code, out, _ = run(capsys, base, write(tmp_path / "nan", o=nan))
    assert code == 3 and out.startswith("NOT TESTABLE") and "NaN or infinity" in out
    assert run(capsys, base, tmp_path / "nowhere")[0] in (2, 4)
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, base, tmp_path / "empty")
    assert code == 4 and "Traceback" not in err
