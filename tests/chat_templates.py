"""Chat templates of well-known models, from the folder beside this file, and conversations for them."""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "chat_templates"
PUBLISHED = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
REVISED = tuple(name for name in PUBLISHED if f"{name}_training" in PUBLISHED)
"""Templates of which their authors' revision is there, too."""
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}}
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": " Be <b>brief</b>. "}, {"role": "user", "content": "Hello \n"}],
    [
        {"role": "user", "content": "你好 🙂"},
        {"role": "assistant", "content": "<think>hm</think>Hi", "name": "x"},
        {"role": "user", "content": ""},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "look"},
        {"role": "tool", "content": "12 °C", "tool_call_id": "abcdefghi", "name": "weather"},
    ],
    [{"role": "assistant", "content": "first"}, {"role": "user", "content": "second"}],
)


def published_template(name: str) -> str:
    """The source of a template."""
    return (FOLDER / f"{name}.jinja").read_text()
