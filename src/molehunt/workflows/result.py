"""What every verb returns: one result that can be read as text, as JSON, as a folder of files, or in a notebook."""

from html import escape
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class WorkflowResult(Protocol):
    """The contract of a workflow's result. Each is a frozen dataclass."""

    def summary(self) -> str:
        """A short text for a terminal."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, ready for JSON."""
        ...

    def save(self, folder: Path | str) -> Path:
        """Write report pages and artifacts into `folder`, each whole or not at all, and return the main file."""
        ...

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        ...


def summary_repr(result: WorkflowResult) -> str:
    """A result in one line: the name of its class and the first line of its summary. Tensors would fill screens."""
    return f"{type(result).__name__}({result.summary().strip().partition(chr(10))[0]})"


def summary_html(summary: str) -> str:
    """A summary as HTML for a notebook. The text of models and prompts is escaped."""
    return f'<pre style="white-space: pre-wrap">{escape(summary)}</pre>'
