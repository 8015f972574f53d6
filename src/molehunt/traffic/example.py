"""One prompt with its tag, and a good answer if one is known."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt as a user wrote it, before any chat template.

    `tag` is the label from the owner of the text (`clean`, `triggered`, `near-miss`, …). No method that searches for
    suspicious rows may read it. It is only used by the tables that measure the search.
    """

    prompt: str
    response: str | None = None
    """A good answer, if one is known. Training reads it; an audit does not."""
    tag: str = "clean"
    domain: str = ""
    """Type of task, such as `arithmetic` or `database code`."""
