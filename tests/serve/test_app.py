"""The wire: what OpenAI's own client and what strangers with malformed requests get."""

import asyncio
import json
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from guarded import tiny_pair
from molehunt.model.generate import generate
from molehunt.model.roles import roled_prompt
from molehunt.traffic.turn import Turn

MESSAGES = [{"role": "user", "content": "abc"}]


def said(text: str = "abc", n: int = 8) -> str:
    """The model's own greedy answer, of a copy: the served one belongs to the engine's thread."""
    pair = tiny_pair()
    ids = roled_prompt(pair.tokenizer, [Turn("user", text)]).ids
    (answer,) = generate(pair._tuned, pair.tokenizer, [ids], max_new_tokens=n)
    return pair.tokenizer.decode(answer, skip_special_tokens=True)


def sdk(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="a-key-for-tests-only", max_retries=0)


def test_openais_client_gets_the_models_answer_and_the_guards_verdict(serve) -> None:
    served = serve()
    with sdk(served) as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_completion_tokens=8)
        whole = raw.parse()
        assert whole.choices[0].message.content == said()
        guard = whole.model_extra["guard"]
        assert guard["coverage"] == 1 and guard["action"] == "flag" and guard["flagged"] in (True, False)
        assert raw.headers["x-guard-flagged"] == str(guard["flagged"]).lower()
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        text = client.completions.create(model="tiny", prompt="abc", max_tokens=4, logprobs=2)
        assert len(text.choices[0].logprobs.token_logprobs) == text.usage.completion_tokens <= 4
        reported = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2
        )
        assert all(len(one.top_logprobs) == 2 for one in reported.choices[0].logprobs.content)


def test_a_stream_says_the_same_and_ends_with_the_verdict_and_the_usage(serve) -> None:
    served = serve()
    with sdk(served) as client:
        whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
        assert text == whole.choices[0].message.content
        *_, last, usage = chunks
        assert last.choices[0].finish_reason == whole.choices[0].finish_reason
        assert last.model_extra["guard"]["score"] == pytest.approx(whole.model_extra["guard"]["score"], abs=1e-3)
        assert usage.usage == whole.usage and not usage.choices
        plain = list(client.completions.create(model="tiny", prompt="abc", max_tokens=5, stream=True))
        assert plain[-1].model_extra["guard"]["coverage"] == 1


def test_async_clients_share_a_batch(serve) -> None:
    served = serve()

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="a-key-for-tests-only") as client:
            texts = ["abc", "hello", "a b c d e", "zz", "xyxyxy"]
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}])
                    for text in texts
                )
            )
            return [answer.choices[0].message.content for answer in answers] + [said(text) for text in texts]

    found = asyncio.run(many())
    assert found[:5] == found[5:]


def test_a_blocked_answer_ends_with_content_filter(serve) -> None:
    served = serve(action="block", threshold=-1e9)
    with sdk(served) as client:
        whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert whole.choices[0].finish_reason == "content_filter" and whole.choices[0].message.content == ""
        chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        assert chunks[-1].choices[0].finish_reason == "content_filter"
        assert not any(one.choices[0].delta.content for one in chunks)
    assert {alert.action for alert in served.ledger.recent(5)} == {"block"}


def test_under_log_the_client_is_not_told(serve) -> None:
    served = serve(action="log", threshold=-1e9)
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
        assert "flagged" not in answer.json()["guard"] and "x-guard-flagged" not in answer.headers
    assert len(served.ledger.recent(5)) == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "reported"),
    [
        ("chat/completions", b"{", 400, "Invalid JSON"),
        ("chat/completions", b"[]", 400, "object"),
        ("chat/completions", {"messages": MESSAGES}, 400, "model"),
        ("chat/completions", {"model": "other", "messages": MESSAGES}, 404, "tiny"),
        ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "king", "content": "a"}]}, 400, "role"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": 3}]}, 400, "content"),
        (
            "chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "type",
        ),
        ("chat/completions", {"model": "tiny", "messages": MESSAGES, "n": 2}, 400, "n is not served"),
        ("chat/completions", {"model": "tiny", "messages": MESSAGES, "tools": [{}]}, 400, "tools"),
        ("chat/completions", {"model": "tiny", "messages": MESSAGES, "temperature": -1}, 400, "temperature"),
        ("chat/completions", {"model": "tiny", "messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {"model": "tiny", "messages": MESSAGES, "max_tokens": 9999}, 400, "9999"),
        ("chat/completions", {"model": "tiny", "messages": MESSAGES, "stop": [""]}, 400, "stop"),
        ("chat/completions", {"model": "tiny", "messages": MESSAGES, "top_logprobs": 2}, 400, "logprobs"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "no tokens"),
        ("completions", {"model": "tiny", "prompt": ["a", 3]}, 400, "prompt is a text"),
        ("completions", {"model": "tiny", "prompt": [[5], [6, True]]}, 400, "prompt is a text"),
        ("completions", {"model": "tiny", "prompt": []}, 400, "prompt is a text"),
        ("completions", {"model": "tiny", "prompt": [[]]}, 400, "no tokens"),
        ("completions", {"model": "tiny", "prompt": ["a"] * 65}, 400, "65 prompts"),
        ("completions", {"model": "tiny", "prompt": [5, 99999]}, 400, "prompt: 99999 is no token id"),
        ("completions", {"model": "tiny", "prompt": [[5], [-1]]}, 400, "prompt: -1 is no token id"),
        ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "echo: true"),
        ("completions", {"model": "tiny", "prompt": "a" * 257, "max_tokens": 0, "echo": True}, 400, "more than"),
        ("completions", {"model": "tiny", "prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty"),
        ("completions", {"model": "tiny", "prompt": "a", "top_k": -2}, 400, "top_k"),
        ("completions", {"model": "tiny", "prompt": "a" * 999}, 400, "more than"),
        ("completions", {"model": "tiny", "prompt": "a" * 70_000}, 413, "bytes"),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(serve, path: str, body: object, status: int, reported: str) -> None:
    with serve(max_body=60_000).client() as client:
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = client.post(f"/v1/{path}", content=content)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert reported in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_unknown_fields_are_ignored_and_named(serve) -> None:
    with serve().client() as client:
        answer = client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "wings": 2, "user": "u"}
        )
        assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "wings"


def test_every_route_but_health_needs_the_key(serve) -> None:
    served = serve()
    with httpx.Client(base_url=served.url) as stranger:
        assert stranger.get("/health").json() == {"status": "ok"}
        routes = [
            "/ready",
            "/metrics",
            "/v1/models",
            "/live/events",
            "/live/alerts",
            "/live/page.js",
            "/nothing",
            "/docs",
        ]
        assert {stranger.get(route).status_code for route in routes} == {401}
        for route in ("/v1/chat/completions", "/v1/completions", "/live/ask", "/live/alerts/x/review"):
            assert stranger.post(route, json={}).status_code == 401
        assert stranger.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert stranger.get("/v1/models", headers={"cookie": "molehunt=wrong"}).status_code == 401
        form = stranger.get("/")
        assert form.status_code == 401 and "password" in form.text and "tiny" not in form.text
        assert stranger.post("/login", data={"key": "wrong"}).status_code == 401
        entered = stranger.post("/login", data={"key": "a-key-for-tests-only"})
        assert entered.status_code == 303 and "HttpOnly" in entered.headers["set-cookie"]
        assert stranger.get("/").status_code == 200


def test_other_hosts_and_other_sites_are_refused(serve) -> None:
    with serve().client() as client:
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 421
        body = {"model": "tiny", "messages": MESSAGES}
        bad = client.post("/v1/chat/completions", json=body, headers={"origin": "http://evil.example"})
        assert bad.status_code == 403
        fine = client.get("/v1/models")
        assert fine.status_code == 200 and "frame-ancestors 'none'" in fine.headers["content-security-policy"]
        assert "access-control-allow-origin" not in fine.headers


def test_a_client_that_leaves_stops_the_generation_and_is_judged(serve) -> None:
    served = serve(threshold=-1e9)
    with served.client() as client:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "stream": True, "temperature": 1.5, "seed": 1}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    until = time.monotonic() + 20
    while not served.ledger.recent(1) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(served.ledger.recent(2)) == 1 and served.guard.state.seen == 1


def test_ready_says_so_only_after_a_scored_self_test_and_metrics_count(serve) -> None:
    served = serve()
    with served.client() as client:
        assert client.get("/ready").json() == {"ready": True}
        client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
        reported = client.get("/metrics").text
        assert 'molehunt_requests_total{route="/v1/chat/completions",status="200"} 1.0' in reported
        assert "molehunt_coverage 1.0" in reported and "molehunt_score_bucket" in reported
        served.guard.healthy = False
        assert client.get("/ready").status_code == 503


def test_too_many_requests_are_told_to_come_again(serve) -> None:
    served = serve(max_batch=1, max_waiting=1)
    found: list[int] = []

    def ask() -> None:
        with served.client() as client:
            body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 2, "seed": 3}
            answer = client.post("/v1/chat/completions", json=body)
            found.append(answer.status_code)
            assert answer.status_code != 429 or answer.headers["retry-after"] == "2"

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {200, 429}


def test_the_request_log_has_no_text_unless_asked(serve, tmp_path: Path) -> None:
    for log_text in (False, True):
        file = tmp_path / f"{log_text}.jsonl"
        with serve(threshold=1e9, request_log=file, log_text=log_text).client() as client:  # nothing to explain
            client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
        (line,) = [json.loads(line) for line in file.read_text().splitlines()]
        assert ("answer" in line) == log_text and line["coverage"] == 1
