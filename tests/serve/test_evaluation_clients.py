"""What evaluation clients send: token ids, echoed prompts with log probabilities, several prompts, and rarer fields."""

import json
from typing import Any

import httpx
import openai
import pytest
import torch

from guarded import PROMPTS, generation, guard_of, tiny_pair
from molehunt.model.pair import ModelPair
from molehunt.serve.backend import Eager
from molehunt.serve.continuous import Continuous
from molehunt.serve.engine import Engine
from molehunt.serve.unsupported import EVERYWHERE, IN_CHATS, IN_TEXTS
from molehunt.serve.wire import ChatRequest, CompletionRequest, Refused, read_request
from molehunt.watch.bank import Bank
from molehunt.watch.ledger import Ledger
from molehunt.watch.state import WatchState

MESSAGES = [{"role": "user", "content": "abc"}]
LOGLIKELIHOOD = {"model": "tiny", "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
"""The body that lm-eval's `local-completions` sends beside the prompts."""


def completed(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/completions", json={"model": "tiny", "stream": True, **body}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def forward(tokens: list[int]) -> torch.Tensor:
    """Log probabilities behind each token, by a plain pass of a copy: the served model belongs to the engine's thread."""
    with torch.inference_mode():
        return tiny_pair()._tuned(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)  # pyright: ignore


def test_openais_client_sends_token_ids_and_retrieves_the_model(serve) -> None:
    served = serve(model_name="org/tiny")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="a-key-for-tests-only", max_retries=0) as client:
        ids, more = [5, 6, 7], [9, 8, 40]
        one = client.completions.create(model="org/tiny", prompt=ids, max_tokens=4, logprobs=1)
        text = client.completions.create(
            model="org/tiny", prompt=served.pair.tokenizer.decode(ids), max_tokens=4, logprobs=1
        )
        assert one.choices == text.choices and one.usage == text.usage and one.usage.prompt_tokens == 3
        both = client.completions.create(model="org/tiny", prompt=[more, ids], max_tokens=4)
        assert [choice.index for choice in both.choices] == [0, 1]
        assert both.choices[1].text == one.choices[0].text and both.usage.prompt_tokens == 6
        assert client.models.retrieve("org/tiny").id == "org/tiny"
        with pytest.raises(openai.NotFoundError, match="the model here is org/tiny") as refused:
            client.models.retrieve("org/other")
        assert refused.value.code == "model_not_found" and refused.value.param == "model"
    assert httpx.get(f"{served.url}/v1/models/org/tiny").status_code == 401


@pytest.mark.parametrize("backend", ["eager", "continuous"])
def test_an_echoed_prompt_has_the_log_probabilities_of_a_plain_pass(
    serve, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molehunt.serve.prompt_logprobs.LOGITS_AT_ONCE", 3 * 96)  # three places at a time
    served = serve(backend=backend)
    with served.client() as client:
        whole = completed(client, **LOGLIKELIHOOD, prompt=PROMPTS)
        plain = completed(client, prompt=PROMPTS, max_tokens=1, temperature=0)
        chunks = streamed(client, **LOGLIKELIHOOD, prompt=PROMPTS)
    decode = served.pair.tokenizer.decode
    for i, (prompt, choice) in enumerate(zip(PROMPTS, whole["choices"], strict=True)):
        found = choice["logprobs"]
        assert choice["index"] == i and choice["guard"]["coverage"] == 1
        answer = found["tokens"][len(prompt) :]
        assert found["tokens"][: len(prompt)] == [decode([token]) for token in prompt] and len(answer) == 1
        assert choice["text"] == decode(prompt) + plain["choices"][i]["text"]
        shown = [token if token != "</s>" or at < len(prompt) else "" for at, token in enumerate(found["tokens"])]
        assert [
            choice["text"][at:][: len(token)] for at, token in zip(found["text_offset"], shown, strict=True)
        ] == shown
        assert found["text_offset"] == sorted(found["text_offset"])
        expected = forward(prompt)
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        for at, token in enumerate(prompt[1:], 1):
            assert found["token_logprobs"][at] == pytest.approx(float(expected[at - 1, token]), abs=1e-4)
            greedy = int(expected[at - 1].argmax()) == token  # as lm-eval decides it, without a tolerance
            assert (found["token_logprobs"][at] == max(found["top_logprobs"][at].values())) == greedy
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert "".join(one["text"] for one in mine) == choice["text"]
        for name in ("tokens", "text_offset"):
            assert [x for one in mine if one["logprobs"] for x in one["logprobs"][name]] == found[name]
    assert len(whole["guard"]) > 1 and whole["usage"]["completion_tokens"] == len(PROMPTS)


def test_offsets_of_an_answer_slice_its_text_also_behind_a_stop_string(serve) -> None:
    with serve().client() as client:
        (choice,) = completed(client, prompt=PROMPTS[0], max_tokens=12, logprobs=2)["choices"]
        text, found = choice["text"], choice["logprobs"]
        tokens = [token for token in found["tokens"] if token != "</s>"]
        assert len(tokens) > 5 and found["text_offset"][: len(tokens)] == list(range(len(tokens)))
        assert all(token in top for token, top in zip(found["tokens"], found["top_logprobs"], strict=True))
        (cut,) = completed(client, prompt=PROMPTS[0], max_tokens=12, logprobs=0, stop=text[3:5], echo=True)["choices"]
        assert cut["text"].endswith(text[: text.index(text[3:5])]) and len(cut["text"]) < len(text) + 3
        assert max(cut["logprobs"]["text_offset"]) <= len(cut["text"])


@pytest.mark.parametrize("backend", ["eager", "continuous"])
def test_nothing_is_generated_for_zero_tokens_and_the_prompt_is_judged(serve, backend: str) -> None:
    served = serve(backend=backend, threshold=-1e9)
    body = {"prompt": "a" * 256, "max_tokens": 0, "echo": True}  # as long as the model reads
    with served.client() as client:
        whole = completed(client, **body)
        (choice,) = whole["choices"]
        assert choice["text"] == "a" * 256 and choice["finish_reason"] == "length" and choice["logprobs"] is None
        assert whole["usage"]["completion_tokens"] == 0 and whole["usage"]["prompt_tokens"] == 256
        assert whole["guard"]["coverage"] == 1 and whole["guard"]["flagged"]
        (choice,) = completed(client, **body, logprobs=0)["choices"]
        assert len(choice["logprobs"]["token_logprobs"]) == 256
        assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    assert [(alert.answer, alert.coverage) for alert in served.ledger.recent(5)] == [("", 1.0)] * 2


@pytest.mark.parametrize("backend", ["eager", "continuous"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_request_gets_its_own_text_and_no_numbers_of_the_model(serve, backend: str, stream: bool) -> None:
    served = serve(backend=backend, action="block", threshold=-1e9)
    with served.client() as client:
        body = {**LOGLIKELIHOOD, "prompt": [PROMPTS[0], PROMPTS[4]], "max_tokens": 5}
        choices = [chunk["choices"][0] for chunk in streamed(client, **body)] if stream else []
        choices = choices or completed(client, **body)["choices"]
    for i, prompt in enumerate((PROMPTS[0], PROMPTS[4])):
        mine = [one for one in choices if one["index"] == i]
        assert "".join(one["text"] for one in mine) == served.pair.tokenizer.decode(prompt)
        assert mine[-1]["finish_reason"] == "content_filter"
        (found,) = [one["logprobs"] for one in mine if one["logprobs"]]
        assert found["token_logprobs"] == found["top_logprobs"] == [None] * len(prompt) and len(prompt) == 3


def test_a_steered_request_reports_the_steered_model_on_both_backends(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    def reported(backend: Any, action: str) -> list[float]:
        heard: list[Any] = []
        guard = guard_of(pair, bank, calibrated_state, ledger, action=action, threshold=-1e9)
        engine = Engine(pair._tuned, pair.tokenizer, guard, backend=backend)
        engine.submit(generation(PROMPTS[3], 2, logprobs=0, prompt_logprobs=True), heard.append)
        engine.close()
        guard.close()
        assert heard[0].text == "" and all(piece.prompt_logprobs is None for piece in heard[1:-1])
        return [one.logprob for one in heard[0].prompt_logprobs]

    plain, steered = ([reported(one, action) for one in (Eager, Continuous)] for action in ("flag", "steer"))
    assert plain[0] == pytest.approx(plain[1], abs=1e-4) and steered[0] == pytest.approx(steered[1], abs=1e-4)
    assert (
        len(plain[0]) == len(PROMPTS[3]) - 1 and max(map(abs, torch.tensor(plain[0]) - torch.tensor(steered[0]))) > 0.1
    )


def test_a_broken_model_reports_no_log_probabilities(serve, pair) -> None:
    served = serve()
    head = pair._tuned.get_parameter("lm_head.weight")
    with served.client() as client, torch.no_grad():
        before = head[7].clone()
        try:
            head[7] = torch.nan
            (choice,) = completed(client, **LOGLIKELIHOOD, prompt=PROMPTS[0])["choices"]
        finally:
            head[7] = before
    assert choice["finish_reason"] == "content_filter" and set(choice["logprobs"]["token_logprobs"]) == {None}


def test_several_prompts_that_find_no_place_are_refused_together(serve) -> None:
    served = serve(max_batch=1, max_waiting=2)
    with served.client() as client:
        refused = client.post("/v1/completions", json={"model": "tiny", "prompt": [[5]] * 30, "max_tokens": 200})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
        assert completed(client, prompt=[5], max_tokens=1)["guard"]["coverage"] == 1


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_fields_that_change_the_answer_are_refused_by_name(kind: Any) -> None:
    chat = kind is ChatRequest
    body = {"model": "tiny", "messages": MESSAGES} if chat else {"model": "tiny", "prompt": "a"}
    lists = {**EVERYWHERE, **(IN_CHATS if chat else IN_TEXTS)}
    for name, harmless in lists.items():
        for value in harmless:
            read_request(kind, json.dumps({**body, name: value}).encode())
        with pytest.raises(Refused, match=rf"^{name} is not served here") as refused:
            read_request(kind, json.dumps({**body, name: {"type": "x"}}).encode())
        assert (refused.value.status, refused.value.param) == (400, name)
    asked = [("min_p", 0.1), ("min_tokens", 3), ("logit_bias", {"5": 1}), ("best_of", 2), ("suffix", "z"), ("n", 2)]
    for name, value in [
        *asked,
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"choice": ["a"]}),
    ]:
        with pytest.raises(Refused, match=f"^{name} is not served here"):
            read_request(kind, json.dumps({**body, name: value}).encode())


def test_calls_of_tools_in_a_conversation_are_refused_by_name() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    found = read_request(ChatRequest, json.dumps({"model": "tiny", "messages": [*MESSAGES, called]}).encode())
    with pytest.raises(Refused, match=r"^tool_calls in a message is not served here"):
        _ = found.turns


def test_the_chat_template_gets_what_it_reads_and_the_rest_is_named(serve, pair, monkeypatch) -> None:
    template = "{% if enable_thinking %}think {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(pair.tokenizer, "chat_template", template)
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    with serve().client() as client:

        def tokens(**settings: object) -> tuple[int, str | None]:
            answer = client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": settings})
            assert answer.status_code == 200, answer.text
            return answer.json()["usage"]["prompt_tokens"], answer.headers.get("x-ignored-fields")

        assert tokens() == tokens(enable_thinking=False) == (3, None)
        assert tokens(enable_thinking=True) == (9, None)
        assert tokens(wings=2) == (3, "chat_template_kwargs.wings")
        for name in ("messages", "tools", "bos_token", "add_generation_prompt", "today"):
            answer = client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {name: "x"}})
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == "chat_template_kwargs" and name in error["message"]


def test_settings_of_a_request_reach_the_sampler_on_both_routes(serve) -> None:
    chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8}
    with serve(threshold=1e9).client() as client:

        def text(**settings: object) -> str:
            return completed(client, prompt="abc", max_tokens=8, **settings)["choices"][0]["text"]

        def said(**settings: object) -> str:
            answer = client.post("/v1/chat/completions", json={**chat, **settings})
            return answer.json()["choices"][0]["message"]["content"]

        for ask in (text, said):
            greedy = ask()
            assert ask(temperature=2, seed=1, top_k=1) == greedy != ask(temperature=2, seed=1, top_k=-1)
            assert ask(temperature=2, seed=1, top_k=0) == ask(temperature=2, seed=1)
            assert ask(repetition_penalty=5.0) != greedy == ask(repetition_penalty=1)
