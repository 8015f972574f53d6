"""inspect_ai evaluates the model behind the guarded server. Needs the extra `peers`."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from folders import good_folder
from guarded import clean_rows
from molehunt.model.generate import generate
from molehunt.model.roles import roled_prompt
from molehunt.traffic.turn import Turn
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend
KEY = "a-key-for-tests-only"
TEXTS = ("abcd", "hg fe", "a")
NEW_TOKENS = 8


@pytest.fixture
def inspect_ai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))  # its traces
    yield pytest.importorskip("inspect_ai", reason="inspect_ai, of the extra molehunt[peers], is not installed")
    gc.collect()  # it leaves streams open, which are errors wherever else they are collected


@contextmanager
def served(root: Path) -> Iterator[tuple[str, Path]]:
    """URL of a server of a tiny pair in a process of its own, and its log of requests."""
    folders = good_folder(root / "base"), good_folder(root / "tuned", seed=1)
    clean = root / "clean.jsonl"
    clean.write_text("".join(json.dumps({"prompt": row.turns[0].text}) + "\n" for row in clean_rows(300)))
    command = [sys.executable, "-m", "molehunt", "serve", *map(str, folders), "--port", "0", "--json"]
    command += ["--clean", str(clean), "--fpr", "0.1", "--max-new-tokens", "3", "--out", str(root / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MOLEHUNT_KEY": KEY})
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], root / "out" / "requests.jsonl"
    finally:
        process.kill()
        process.communicate()


def said(text: str) -> str:
    """The model's own greedy answer."""
    ids = roled_prompt(tiny_tokenizer(), [Turn("user", text)]).ids
    (answer,) = generate(tiny_model("llama", 1), tiny_tokenizer(), [ids], max_new_tokens=NEW_TOKENS)
    return tiny_tokenizer().decode(answer, skip_special_tokens=True)


def test_inspect_evaluates_the_served_model_and_every_request_is_covered(
    inspect_ai: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig
    from inspect_ai.scorer import match

    wanted = [*map(said, TEXTS[:2]), "not what it says"]
    task = inspect_ai.Task(
        dataset=[Sample(input=text, target=target) for text, target in zip(TEXTS, wanted, strict=True)],
        scorer=match(location="exact", ignore_case=False),
        config=GenerateConfig(temperature=0, max_tokens=NEW_TOKENS, max_retries=0),
    )
    monkeypatch.setenv("MOLEHUNT_API_KEY", KEY)
    with served(tmp_path) as (url, request_log):
        monkeypatch.setenv("MOLEHUNT_BASE_URL", f"{url}/v1")
        (log,) = inspect_ai.eval(
            task, model="openai-api/molehunt/tuned", log_dir=str(tmp_path / "logs"), display="none"
        )
        logged = [json.loads(line) for line in request_log.read_text().splitlines()]

    assert log.status == "success", log.error
    assert [sample.output.completion for sample in log.samples] == [said(text) for text in TEXTS]
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(2 / 3)
    assert len(logged) == len(TEXTS)
    assert {line["coverage"] for line in logged} == {1}
    assert sorted(line["answer_tokens"] for line in logged) == sorted(
        sample.output.usage.output_tokens for sample in log.samples
    )
