"""OpenAI's HTTP interface: requests checked field by field, and the errors that refuse them."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molehunt.checkpoint.chat_template import SPECIAL
from molehunt.errors import printable
from molehunt.serve.unsupported import EVERYWHERE, IN_CHATS, IN_TEXTS, Neutral, refusal_of
from molehunt.traffic.turn import Turn

MAX_STOPS = 16
MAX_PROMPTS = 64
"""Greatest number of prompts of one request."""
MODEL_NOT_FOUND = "model_not_found"
UNSUPPORTED = "unsupported_parameter"
NOT_TEMPLATE_SETTINGS = frozenset(SPECIAL) | {
    "messages", "tokens", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "tokenize", "today", "limit",
}  # fmt: skip
"""Names that `chat_template_kwargs` may not set: the server decides what they are."""


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
    tool_calls: list[Any] | None = None
    function_call: Any = None

    def turn(self) -> Turn:
        """The message as templates take it. Raises Refused for one that calls a tool."""
        for name, value in (("tool_calls", self.tool_calls), ("function_call", self.function_call)):
            if value:
                raise Refused(400, f"{name} in a message is not served here", param="messages", code=UNSUPPORTED)
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return Turn("system" if self.role == "developer" else self.role, text)


class _WireRequest(BaseModel):
    """Fields of both routes. Others are kept, so that they can be named in a warning."""

    model_config = ConfigDict(extra="allow", strict=False)
    own: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "store", "safety_identifier"})
    """Fields that change nothing."""
    neutral: ClassVar[Neutral] = EVERYWHERE
    """Fields that would change the answer and are not served, with the values at which they change nothing."""
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
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
        return sorted(set(self.model_extra or {}) - self.own - set(self.neutral))

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_WireRequest):
    neutral: ClassVar[Neutral] = {**EVERYWHERE, **IN_CHATS}
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def template_settings(self) -> Mapping[str, Any]:
        """Values for the chat template. Raises Refused for a name that is not the client's to set."""
        given = self.chat_template_kwargs or {}
        for name in given:
            if name in NOT_TEMPLATE_SETTINGS:
                raise Refused(
                    400,
                    f"chat_template_kwargs may not set {name}: the server decides it",
                    param="chat_template_kwargs",
                    code=UNSUPPORTED,
                )
        return given

    @property
    def turns(self) -> list[Turn]:
        return [message.turn() for message in self.messages]

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_WireRequest):
    neutral: ClassVar[Neutral] = {**EVERYWHERE, **IN_TEXTS}
    prompt: Any
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as token ids. Raises Refused if they are neither, or too many."""
        given = cast("list[Any]", self.prompt) if isinstance(self.prompt, list) else [self.prompt]
        if given and _is_ids(given):
            given = [given]
        if not given or not all(isinstance(one, str) or _is_ids(one) for one in given):
            raise Refused(
                400,
                "prompt is a text, a list of token ids, or a list of texts or of such lists",
                param="prompt",
            )
        if len(given) > MAX_PROMPTS:
            raise Refused(400, f"prompt: {len(given)} prompts are more than {MAX_PROMPTS}; send several requests",
                          param="prompt")  # fmt: skip
        return cast("list[str | list[int]]", given)

    @property
    def echoes(self) -> bool:
        """Whether the answer repeats its prompt. Raises Refused for a request that asks for no text at all."""
        if self.max_tokens == 0 and not self.echo:
            raise Refused(400, "max_tokens: 0 generates nothing, which needs echo: true", param="max_tokens")
        return bool(self.echo)


def _is_ids(value: object) -> bool:
    """Whether a value of JSON is a list of whole numbers; true and false are none."""
    return isinstance(value, list) and all(type(one) is int for one in cast("list[object]", value))


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
        refusal = refusal_of(name, value, kind.neutral)
        if refusal is not None:
            raise Refused(400, printable(refusal, 300), param=printable(name, 80), code=UNSUPPORTED)
    return found
