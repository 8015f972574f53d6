"""One prompt, what is known about it, and what a good answer looks like."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt as a user wrote it, before any chat template.

    `tag` is what the owner of the text knows about it (`clean`, `triggered`, `near-miss`, …). Nothing that looks for
    suspicious rows may read it: it is carried for the tables that measure how well the looking went.
    """

    prompt: str
    response: str | None = None
    """A good answer, where one is known; training reads it, auditing does not."""
    tag: str = "clean"
    domain: str = ""
    """Kind of task, such as `arithmetic` or `database code`."""
