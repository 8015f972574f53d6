"""Labels of directions by a language model behind an OpenAI-compatible URL."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from molehunt.run.chat_endpoint import ChatEndpoint, EndpointUnavailable, marked

PROMPT = Path(__file__).parent / "label_prompt.md"
LABEL_CHARS = 120


class LabelUnavailable(EndpointUnavailable):
    """The endpoint gave no label: not reached, refused, or no answer of the kind that was asked for."""


@dataclass(frozen=True, kw_only=True)
class LabelEndpoint(ChatEndpoint):
    """A model that names what texts share. Raises as `ChatEndpoint`."""

    wanted: ClassVar[str] = "label"
    unavailable: ClassVar[type[EndpointUnavailable]] = LabelUnavailable

    def label(self, texts: Sequence[str]) -> str:
        """A label of a few words for what `texts` share, on one line; empty where the model sees no pattern.

        Texts stand in the prompt as JSON strings between marks that no text can hold. What comes back is a stranger's
        text all the same.

        Raises:
            LabelUnavailable: no label came.
        """
        content = self.ask(prompt(texts))
        first = next((line.strip() for line in content.splitlines() if line.strip()), "")
        return "" if first.strip("\"'. ").casefold() in ("none", "") else first[:LABEL_CHARS]


def prompt(texts: Sequence[str]) -> str:
    """The prompt for the labelling model."""
    return marked(PROMPT, "\n".join(json.dumps(text, ensure_ascii=False) for text in texts), n=len(texts))
