"""OpenAI's HTTP interface: requests checked field by field, and responses of its shapes with a `guard` object beside them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from molehunt.errors import printable
from molehunt.serve.request import Ended
from molehunt.serve.sampling import TokenLogprobs
from molehunt.traffic.turn import Turn

MAX_STOPS = 16
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
}
"""Fields that would change the answer and are not served, with the values at which they change nothing."""


class Refused(Exception):
    """A request that is not served; the client gets an error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_s = retry_s
        """Seconds after which another try may do better."""

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _ContentPart(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_ContentPart] | None = None

    def turn(self) -> Turn:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return Turn("system" if self.role == "developer" else self.role, text)


class _WireRequest(BaseModel):
    """Fields of both routes. Others are kept, so that they can be named in a warning."""

    model_config = ConfigDict(extra="allow", strict=False)
    own: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "store", "safety_identifier"})
    """Fields that change nothing."""
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MAX_STOPS or not all(given):
            raise Refused(400, f"stop takes up to {MAX_STOPS} strings, none of them empty", param="stop")
        return tuple(given)

    @property
    def ignored(self) -> list[str]:
        """Names of fields that this server does not know."""
        return sorted(set(self.model_extra or {}) - self.own - set(NEUTRAL))

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_WireRequest):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def turns(self) -> list[Turn]:
        return [message.turn() for message in self.messages]

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_WireRequest):
    prompt: str | list[str] | list[int]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def one_prompt(self) -> str | list[int]:
        """Text or token ids. Raises Refused for several prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        if all(isinstance(one, int) for one in self.prompt):
            return [one for one in self.prompt if isinstance(one, int)]
        if len(self.prompt) != 1:
            raise Refused(400, "one prompt a request; send several requests, they are batched", param="prompt")
        return str(self.prompt[0])


R = TypeVar("R", ChatRequest, CompletionRequest)


def read_request(kind: type[R], body: bytes) -> R:
    """The request in `body`. Raises Refused naming the first field that is wrong or not served."""
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        first = max(wrong, key=lambda one: len(one["loc"]))  # of a union's branches, the one that went furthest
        where = ".".join(str(part) for part in first["loc"])
        raise Refused(
            400, printable(f"{where}: {first['msg']}" if where else str(first["msg"]), 300), param=where or None
        ) from None
    for name, value in (found.model_extra or {}).items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise Refused(400, f"{name} is not served here", param=name, code="unsupported_parameter")
    return found


class Shape:
    """Responses of one request: whole, or chunk by chunk."""

    def __init__(self, *, chat: bool, id: str, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{id}", "created": int(time.time()), "model": model}

    def whole(self, text: str, logprobs: Sequence[TokenLogprobs] | None, end: Ended) -> dict[str, Any]:
        shaped = self._logprobs(logprobs)
        body = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": shaped, "finish_reason": _reason(end)}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": _usage(end), "guard": end.verdict.to_dict()}

    def first(self) -> dict[str, Any] | None:
        """A chat stream begins by naming the role."""
        return self._chunk({"role": "assistant", "content": ""}, None, None) if self._chat else None

    def piece(self, text: str, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        return self._chunk({"content": text} if self._chat else text, logprobs, None)

    def last(self, end: Ended) -> dict[str, Any]:
        return {**self._chunk({} if self._chat else "", None, _reason(end)), "guard": end.verdict.to_dict()}

    def usage(self, end: Ended) -> dict[str, Any]:
        """The chunk that `include_usage` asks for, behind the last."""
        return {**self._chunk({}, None, None), "choices": [], "usage": _usage(end)}

    def _chunk(
        self, delta: dict[str, Any] | str, logprobs: Sequence[TokenLogprobs] | None, reason: str | None
    ) -> dict[str, Any]:
        body = {"delta": delta} if self._chat else {"text": delta}
        choice = {"index": 0, **body, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        return {
            **self._head,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": [choice],
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        if self._chat:
            content = [
                {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*top) for top in one.top]}
                for one in logprobs
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._text(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self._text(token): value for token, value in one.top} for one in logprobs],
            "text_offset": [],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def _reason(end: Ended) -> str:
    return "stop" if end.reason == "cancelled" else end.reason


def _usage(end: Ended) -> dict[str, int]:
    prompt, answer = end.prompt_tokens, end.answer_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
