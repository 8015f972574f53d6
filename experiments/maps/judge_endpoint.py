"""How much of an answer a replacement keeps, on a scale of 1 to 5, by a language model behind an OpenAI-compatible URL."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from molehunt.run.chat_endpoint import ChatEndpoint, EndpointUnavailable, marked

PROMPT = Path(__file__).parent / "judge_prompt.md"
ANSWER = re.compile(r"(?:score|rating)?[\s:*\"'.]{0,8}([1-5])(?:\s?/\s?5)?[\s*\"'.]{0,8}", re.IGNORECASE)


class JudgementUnavailable(EndpointUnavailable):
    """The endpoint gave no score: not reached, refused, or no number from 1 to 5."""


@dataclass(frozen=True, kw_only=True)
class JudgeEndpoint(ChatEndpoint):
    """A model that compares answers. It does not learn which model or method gave them. Raises as `ChatEndpoint`."""

    wanted: ClassVar[str] = "score"
    unavailable: ClassVar[type[EndpointUnavailable]] = JudgementUnavailable

    def score(self, prompt: str, own: str, answer: str) -> int:
        """1 (nothing in common) to 5 (the same) for an `answer` beside the target's `own`; the rubric is `judge_prompt.md`.

        Raises:
            JudgementUnavailable: no score came. Rows without one are to be counted, not left out unsaid.
        """
        content = self.ask(question(prompt, own, answer))
        found = ANSWER.fullmatch(content)
        if found is None:
            raise self.refused(f"its answer is no number from 1 to 5: {content[:100]}")
        return int(found[1])


def question(prompt: str, own: str, answer: str) -> str:
    """What the model is asked."""
    return marked(PROMPT, "\n".join(json.dumps(text, ensure_ascii=False) for text in (prompt, own, answer)))
