"""`molehunt serve` as a process: it starts, survives kill -9 with every alert, drains on SIGTERM, and says what is wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from folders import good_folder, lora_folder
from molehunt.cli.main import main
from molehunt.serve import server  # here, since the shape checks' import hook cannot go as deep as a command's imports
from molehunt.watch.ledger import Ledger

KEY = "a-key-for-tests-only"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return good_folder(root / "base"), lora_folder(root / "tuned")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clean") / "clean.jsonl"
    texts = ["".join("abcdefgh"[(i * 7 + j * j * 3 + i * i) % 8] for j in range(5)) for i in range(300)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@contextmanager
def served(folders: tuple[Path, Path], clean: Path, out: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [sys.executable, "-m", "molehunt", "serve", *map(str, folders), "--port", "0", "--json"]
    command += ["--clean", str(clean), "--fpr", "0.1", "--max-new-tokens", "3", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MOLEHUNT_KEY": KEY})
    try:
        assert process.stdout is not None
        output = json.loads(process.stdout.readline())
        assert output["key"] == KEY
        with httpx.Client(base_url=output["url"], headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def ask(client: httpx.Client, text: str) -> dict:
    answer = client.post(
        "/v1/chat/completions", json={"model": "tuned", "messages": [{"role": "user", "content": text}]}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["guard"]


def ask_until_terminated(process: subprocess.Popen[str], client: httpx.Client) -> list[str]:
    """The rest of a long answer that was running when the server had to stop."""
    body = {"model": "tuned", "messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 150}
    with client.stream("POST", "/v1/chat/completions", json={**body, "temperature": 2, "seed": 1}) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        return list(lines)


def test_no_alert_that_a_client_heard_of_is_lost_by_kill_9_and_a_drain_finishes_what_was_begun(
    folders, clean: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    alerts: list[str] = []
    with served(folders, clean, out) as (process, client):
        for text in ("!#$%&", "****", "a", "%%%%%%%%", "(&)(&)", "bcbc", "!!", "$", "#&#&", "))))"):
            guard = ask(client, text)
            assert guard["coverage"] == 1
            alerts += [guard["alert"]] if guard["flagged"] else []
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert alerts
    with served(folders, clean, out) as (process, client):  # no new calibration: the state is there
        assert client.get("/ready").json() == {"ready": True}
        page = client.get("/live/alerts").text
        assert all(f"alert-{id}" in page for id in alerts)
        seen = ask(client, "abc")
        rest = ask_until_terminated(process, client)
        assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
        assert process.wait(30) in (0, -signal.SIGTERM)
    with Ledger(f"sqlite:///{out / 'alerts.sqlite'}") as ledger:
        assert {one.id for one in ledger.recent(99)} >= set(alerts)
    *_, answered, drained = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert answered["score"] == pytest.approx(seen["score"]) and "answer" not in answered
    assert drained["answer_tokens"] > answered["answer_tokens"]


def test_the_backend_reaches_the_server(monkeypatch, folders, clean: Path, tmp_path: Path) -> None:
    output: list[str] = []
    monkeypatch.setattr(server, "run_server", lambda pair, guard, keys, settings, **_: output.append(settings.backend))
    arguments = ["serve", *map(str, folders), "--clean", str(clean), "--fpr", "0.1", "--max-new-tokens", "3"]
    for extra in ((), ("--backend", "continuous")):
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--out", str(tmp_path / "out"), *extra])
        assert left.value.code == 0
    assert output == ["eager", "continuous"]


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (("--host", "0.0.0.0"), 2, "give a key of yours"),
        (("--no-text", "--log-text"), 2, "opposite"),
        (("--host", "203.0.113.1", "--key-file", "KEY"), 2, "cannot be listened on"),
        (("--key-file", "SHORT"), 2, "at least 16"),
        (("--key-file", "MISSING"), 2, "MISSING"),
        (("--ledger", "mysql://x"), 2, "no URL of a ledger"),
        (("--fpr", "0.0001"), 3, "false-positive rate"),
    ],
)
def test_what_cannot_be_served_is_said(
    capsys, monkeypatch, folders, clean: Path, tmp_path: Path, extra: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.delenv("MOLEHUNT_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("KEY").write_text(KEY)
    Path("SHORT").write_text("short")
    arguments = ["serve", *map(str, folders), "--clean", str(clean), "--fpr", "0.1", "--max-new-tokens", "3", *extra]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == code and said in capsys.readouterr().err
