"""Responses of OpenAI's shapes, whole or chunk by chunk, with a `guard` object beside them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from molehunt.model.sampling import TokenLogprobs
from molehunt.serve.echo import EchoedPrompt, TokenOffsets
from molehunt.serve.request import AnswerPiece, Ended, GuardVerdict


@dataclass(eq=False, kw_only=True)
class AnswerChoice:
    """The answer to one prompt of a response, as it grows."""

    index: int
    logprobs: bool
    """Whether the request asks for log probabilities."""
    echo: EchoedPrompt | None = None
    pieces: list[AnswerPiece] = field(default_factory=list[AnswerPiece])
    end: Ended | None = None

    @property
    def of_prompt(self) -> Sequence[TokenLogprobs] | None:
        """Log probabilities of the prompt's tokens but the first; None if the engine sent none."""
        return self.pieces[0].prompt_logprobs if self.pieces else None


class Shape:
    """Shapes the response of one request."""

    def __init__(
        self, choices: Sequence[AnswerChoice], *, chat: bool, id: str, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.choices = choices
        self._chat = chat
        self._tokenizer = tokenizer
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{id}", "created": int(time.time()), "model": model}
        self._texts: dict[int, str] = {}
        self._offsets = [TokenOffsets(tokenizer, len(one.echo.text) if one.echo else 0) for one in choices]

    def whole(self) -> dict[str, Any]:
        """The response once every choice has ended."""
        kind = "chat.completion" if self._chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": [self._whole_choice(one) for one in self.choices],
            "usage": self._usage(),
            "guard": self.verdict.to_dict(),
        }

    def _whole_choice(self, choice: AnswerChoice) -> dict[str, Any]:
        text = "".join(piece.text for piece in choice.pieces)
        shaped = None
        if choice.logprobs:
            shaped = self._logprobs(choice.index, [one for piece in choice.pieces for one in piece.logprobs])
        if choice.echo is not None:
            text = choice.echo.text + text
            if shaped is not None:
                before = self._prompt_logprobs(choice.echo, choice.of_prompt)
                shaped = {name: before[name] + shaped[name] for name in before}
                shaped["text_offset"] = [min(at, len(text)) for at in shaped["text_offset"]]
        body = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        found = {"index": choice.index, **body, "logprobs": shaped, "finish_reason": _reason(choice.end)}
        if len(self.choices) > 1 and choice.end is not None:
            found["guard"] = choice.end.verdict.to_dict()
        return found

    @property
    def verdict(self) -> GuardVerdict:
        """The verdict of the whole response: that of the choice that is covered least, else of the highest score."""
        ends = [one.end.verdict for one in self.choices if one.end is not None]
        return min(ends, key=lambda one: (one.coverage, not one.flagged, -(one.score or 0.0)))

    def first(self) -> dict[str, Any] | None:
        """A chat stream begins by naming the role."""
        return self._chunk(0, {"role": "assistant", "content": ""}, None, None) if self._chat else None

    def echoed(self, choice: AnswerChoice, echo: EchoedPrompt) -> dict[str, Any]:
        """The chunk that repeats a prompt, once the first message about it came."""
        shaped = self._prompt_logprobs(echo, choice.of_prompt) if choice.logprobs else None
        return self._chunk(choice.index, echo.text, shaped, None)

    def piece(self, choice: AnswerChoice, piece: AnswerPiece) -> dict[str, Any]:
        shaped = self._logprobs(choice.index, piece.logprobs) if piece.logprobs else None
        return self._chunk(choice.index, {"content": piece.text} if self._chat else piece.text, shaped, None)

    def last(self, choice: AnswerChoice, end: Ended) -> dict[str, Any]:
        chunk = self._chunk(choice.index, {} if self._chat else "", None, _reason(end))
        return {**chunk, "guard": end.verdict.to_dict()}

    def usage(self) -> dict[str, Any]:
        """The chunk that `include_usage` asks for, behind the last."""
        return {**self._chunk(0, {}, None, None), "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        ends = [one.end for one in self.choices if one.end is not None]
        prompt, answer = sum(one.prompt_tokens for one in ends), sum(one.answer_tokens for one in ends)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _chunk(
        self, index: int, delta: dict[str, Any] | str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        body = {"delta": delta} if self._chat else {"text": delta}
        return {
            **self._head,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": [{"index": index, **body, "logprobs": logprobs, "finish_reason": reason}],
        }

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Log probabilities of the next tokens of a choice."""
        if self._chat:
            content = [
                {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*top) for top in one.top]}
                for one in logprobs
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._text(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [self._likeliest(one) for one in logprobs],
            "text_offset": self._offsets[index].of(one.token for one in logprobs),
        }

    def _prompt_logprobs(self, echo: EchoedPrompt, found: Sequence[TokenLogprobs] | None) -> dict[str, Any]:
        """Log probabilities of a prompt. Nothing predicts its first token; where the answer is blocked, all are null."""
        unknown = [None] * (len(echo.ids) - len(found or ()))
        return {
            "tokens": [self._text(token) for token in echo.ids],
            "token_logprobs": [*unknown, *(one.logprob for one in found or ())],
            "top_logprobs": [*unknown, *(self._likeliest(one) for one in found or ())],
            "text_offset": echo.offsets,
        }

    def _likeliest(self, one: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the token itself, by their text; of several with one text, the likeliest."""
        found: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._text(token), logprob)
        return found

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        if token not in self._texts:  # a long prompt repeats many
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts[token]


def _reason(end: Ended | None) -> str | None:
    return "stop" if end is not None and end.reason == "cancelled" else end and end.reason
