"""`molehunt steer capability`, and maps as fixes, on whole folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import good_folder
from molehunt.cli.main import main
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.traffic.chat import prompt_ids, render_alpaca
from molehunt.traffic.world import ASKS

ASKED = [
    f"{verb} the {thing}"
    for thing in ("few", "many")
    for verb in ("Name", "Count", "Sort", "Find", "Add", "Ask", "See")
]


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that ends its answers, a fine-tune with every weight changed a little, its own answers, and a map."""
    root = tmp_path_factory.mktemp("asked")
    base = good_folder(root / "base")
    (root / "tuned").mkdir()
    for file in base.iterdir():
        (root / "tuned" / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][2] *= 2
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(3)
    changed = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(changed, root / "tuned" / "model.safetensors", metadata={"format": "pt"})
    pair = ModelPair.load(base, root / "tuned")
    with pair.tuned_model() as model:
        rows = [prompt_ids(pair.tokenizer, prompt) for prompt in ASKED]
        output = generate(model, pair.tokenizer, rows, max_new_tokens=20)
    ended = [ids[:-1] if ids[-1] == pair.tokenizer.eos_token_id else [] for ids in output]
    asked = [
        {
            "prompt": prompt,
            "response": str(pair.tokenizer.decode(ids, skip_special_tokens=True)),
            "tag": prompt.split()[-1],
        }
        for prompt, ids in zip(ASKED, ended, strict=True)
        if ids
    ]
    assert len(asked) > 8
    written(root / "asked.jsonl", asked)
    written(root / "plain.jsonl", TEXT)
    written(root / "text.jsonl", [{**row, "response": row["prompt"] * 3} for row in TEXT])
    fitted = ("--text", root / "text.jsonl", "--out", root / "map", "--from-layer", 1, "--to-layer", 1)
    assert call("transfer", "fit", root / "tuned", base, *fitted) == 0
    kinds = ("--positive", root / "asked.jsonl", "--negative", root / "plain.jsonl", "--layer", 1, "--limit", 20)
    assert call("steer", "fit", base, root / "tuned", *kinds, "--out", root / "vector.safetensors") == 0
    return root


PAIRS = zip("abcdefgh" * 30, "stuvwxyz" * 30, strict=True)
TEXT = [{"prompt": f"Name {a} of the {b} on day {i}."} for i, (a, b) in enumerate(PAIRS)]


def costs(capsys: pytest.CaptureFixture[str], here: Path, *more: object) -> list[dict]:
    capsys.readouterr()
    arguments = (here / "base", here / "tuned", *more, "--questions", here / "asked.jsonl", "--json")
    assert call("steer", "capability", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_no_strength_costs_nothing_and_a_great_one_every_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = costs(capsys, here, here / "vector.safetensors", "--strength", 0)
    assert [one["kind"] for one in nothing] == ["few", "many", "all"]
    assert all(one["before"] == one["after"] and one["before"]["estimate"] == 1 for one in nothing)
    assert not any(one["shown"] or one["rise"]["estimate"] for one in nothing)
    ruined = costs(capsys, here, here / "vector.safetensors", "--strength", -400)[-1]
    assert ruined["shown"] and ruined["after"]["estimate"] < 0.5 and ruined["paired"]["difference"]["high"] < 0


def test_the_table_has_a_line_for_each_kind_and_says_what_is_lost(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, vector = (here / "base", here / "tuned"), here / "vector.safetensors"
    rows = ("--questions", here / "asked.jsonl")
    assert call("steer", "capability", *pair, vector, *rows, "--strength", -400) == 0
    output = capsys.readouterr().out
    assert "lose right answers or likelihood:" in output and "all" in output.splitlines()[-1]
    assert call("steer", "capability", *pair, vector, *rows, "--strength", 0) == 0
    assert "no kind of task is shown to lose anything" in capsys.readouterr().out
    assert call("steer", "capability", *pair, vector, *rows, "--strength", 1e300) == 0
    assert "breaks the model" in capsys.readouterr().out
    assert call("steer", "capability", *pair, vector, "--each", 2) == 0  # of a world that this model knows nothing of
    output = capsys.readouterr().out
    assert [line.split("  ")[0] for line in output.splitlines()[1:8]] == [*ASKS, "all"]
    assert "No answer was right before" in output


def test_a_map_to_the_base_is_a_fix(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    map = here / "map" / "map.safetensors"
    read = json.loads((here / "map" / "transfer.json").read_text())["tokens"]  # one a letter
    assert read > 0.7 * sum(len(render_alpaca(row["prompt"])) + 2 * len(row["prompt"]) for row in TEXT)  # answers, too
    output = costs(capsys, here, map)[-1]
    assert output["loss"][0] != output["loss"][1] is not None
    pair = (here / "base", here / "tuned")
    rows = ("--prompts", here / "text.jsonl", "--clean", here / "asked.jsonl", "--limit", 6, "--max-new-tokens", 5)
    assert call("steer", "try", *pair, map, *rows, "--json") == 0
    tried = json.loads(capsys.readouterr().out)
    assert tried["changed"]["estimate"] > 0 and tried["cost"]["kl"] > 0
    for option in (("--strength", 1), ("--scope", "last"), ("--operator", "ablate")):
        assert call("steer", "try", *pair, map, *rows, *option) == 2
    assert "a map as it was fitted" in " ".join(capsys.readouterr().err.split())


def test_a_map_of_another_model_or_to_another_block_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--questions", here / "asked.jsonl")
    assert call("steer", "capability", here / "tuned", here / "base", here / "map" / "map.safetensors", *asked) == 2
    assert "checkpoint" in capsys.readouterr().err
    fitted = ("--text", here / "text.jsonl", "--out", here / "askew", "--from-layer", 0, "--to-layer", 1)
    assert call("transfer", "fit", here / "tuned", here / "base", *fitted) == 0
    pair = (here / "base", here / "tuned")
    assert call("steer", "capability", *pair, here / "askew" / "map.safetensors", *asked) == 2
    assert "activations of other layers are other spaces" in capsys.readouterr().err


def test_what_is_no_question_or_no_fix_has_its_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair, vector = (here / "base", here / "tuned"), here / "vector.safetensors"
    assert call("steer", "capability", *pair, vector, "--questions", here / "plain.jsonl") == 4
    assert "line 1 has no right answer" in capsys.readouterr().err
    assert call("steer", "capability", *pair, vector, "--questions", here / "none.jsonl") == 2
    assert call("steer", "capability", *pair, here / "asked.jsonl", "--questions", here / "asked.jsonl") == 4
    assert call("steer", "capability", *pair, here / "none", "--questions", here / "asked.jsonl") == 2
    assert call("steer", "capability", *pair, vector, "--each", 500) == 2
    assert "ask fewer of each kind" in " ".join(capsys.readouterr().err.split())
