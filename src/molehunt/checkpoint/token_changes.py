"""Added tokens in which two tokenizers differ, and what each difference does."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from molehunt.checkpoint.tokenizer_corpus import around
from molehunt.checkpoint.tokenizer_rules import unpublished_rules
from molehunt.checkpoint.tokenizer_state import TokenizerState

ChangeKind = Literal["new", "gone", "renamed", "taken", "moved", "alike"]
_NAMES = (
    "s|unk|pad|mask|bos|eos|sep|cls|eot|eod|sop|eop|think|tool_call|tool_calls|tool_response|tool_result|"
    "tool_results|tool_output|tool_outputs|start_of_turn|end_of_turn|start_of_image|end_of_image|"
    "start_of_audio|end_of_audio|image_soft_token|audio_soft_token|start_function_call|end_function_call|"
    "start_function_response|end_function_response|start_function_declaration|end_function_declaration|image|"
    "fim_prefix|fim_middle|fim_suffix|fim_pad|file_sep|gh_stars|issue_start|issue_comment|issue_closed|"
    "jupyter_start|jupyter_text|jupyter_code|jupyter_output|jupyter_script|empty_output|commit_before|"
    "commit_msg|commit_after|start_of_role|end_of_role|im_start|im_end|im_patch|vision_start|vision_end|"
    "begin_of_text|end_of_text|endoftext|startoftext|begin_of_sentence|end_of_sentence"
)
_CAPITALS = (
    "INST|CLS|SEP|MASK|PAD|UNK|BOS|EOS|EOT|gMASK|sMASK|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|"
    "SYSTEM_PROMPT|MODEL_SETTINGS|CALL_ID|IMG_BREAK|IMG_END|BEGIN_AUDIO|THINK"
)
_NUMBERED = r"(?:(?:unused|reserved)(?:_special)?(?:_token)?|extra_id|custom_token|special|control)[_-]?\d+"
MARKER = re.compile(
    rf"<\|[^<>|\s]{{1,60}}\|>|<｜[^<>｜]{{1,60}}｜>|</?(?:(?:seed|minimax):)?(?:{_NAMES})>"
    rf"|\[/?(?:{_CAPITALS})\]|<</?SYS>>|<(?i:{_NUMBERED})>|\[(?i:{_NUMBERED})\]"
    r"|<(?:BOS|EOS|PAD|UNK|CLS|SEP|MASK|EOP)(?:_TOKEN)?>|<0x[0-9A-F]{2}>|<loc\d{4}>|<seg\d{3}>|<IMG_(?:START|CONTEXT|END)>"
)
"""How the marks of published chat formats and vocabularies are written. Other words in brackets stand in ordinary text and
in code: `a[i]`, `f"{x}"`, `List<int>`, `[urgent]`."""
RESERVED = re.compile(r"unused|reserved|extra_|extra\d|dummy|placeholder|spare|fim_pad", re.IGNORECASE)

TOGETHER = 25
"""Number of tokens whose flags are tried in one text."""


@dataclass(frozen=True, slots=True)
class TokenChange:
    """One added token that is not the same on both sides."""

    content: str
    base: str
    """Id and flags in the base; empty where the base has no such token."""
    tuned: str
    kind: ChangeKind
    """`new` and `gone` stand at an id that the other side does not use, `renamed` at that of a reserved token of the other
    side, `taken` at that of any other token; `moved` is a token of both sides with another id or other flags, and `alike` one whose other flags change no text."""

    @property
    def one_sided(self) -> bool:
        """Whether only one side has the token, so that text which holds it becomes other ids by itself."""
        return self.kind not in ("moved", "alike")

    @property
    def is_marker(self) -> bool:
        """Whether it is written as the marks of chat formats are, such as `<|im_end|>` or `[PAD]`, and takes nothing over."""
        return self.kind in ("new", "gone", "renamed") and MARKER.fullmatch(self.content) is not None

    @property
    def is_harmless(self) -> bool:
        """Whether ordinary text becomes the same tokens with this change as without it."""
        return self.is_marker or self.kind == "alike"

    @property
    def id_of_base(self) -> int:
        return int(self.base.split()[0]) if self.base else -1

    @property
    def folded(self) -> str:
        """The content as it is looked for in texts whose case is folded, too."""
        return self.content.strip().casefold()

    @property
    def why(self) -> str:
        if self.kind == "moved":
            return "a token has another id or other flags: the same text becomes other tokens"
        if self.kind == "alike":
            return "a token has other flags: the same text becomes the same tokens"
        if self.kind == "taken":
            return "a token stands where the other side has another one"
        if self.kind == "renamed":
            return "a reserved token of the other side was given this name"
        done = "added" if self.kind == "new" else "removed"
        return f"a token was {done}" + ("" if self.is_marker else ": ordinary text that holds it becomes other tokens")


def token_changes(base: TokenizerState, tuned: TokenizerState) -> list[TokenChange]:
    """Every added token that differs in id, flags or presence, in the order of their contents."""
    held = [{place: content for content, place in side.vocabulary.items()} for side in (base, tuned)]
    found: list[TokenChange] = []
    alike = _alike(base, tuned)
    for content in sorted(base.added.keys() | tuned.added.keys()):
        one, other = base.added.get(content, ""), tuned.added.get(content, "")
        if one == other:
            continue
        if one and other:
            found.append(TokenChange(content, one, other, "alike" if content in alike else "moved"))
            continue
        own, foreign = (tuned, 0) if other else (base, 1)
        place = int((one or other).split()[0])
        stands = held[foreign].get(place)
        kind: ChangeKind = "new" if own is tuned else "gone"
        if stands == content:  # an ordinary token of the other side became a special one: nothing else has its place
            kind = "moved"
        elif stands is not None:
            kind = "renamed" if _reserved(stands, content, base, tuned) else "taken"
        found.append(TokenChange(content, one, other, kind))
    return found


def _alike(base: TokenizerState, tuned: TokenizerState) -> frozenset[str]:
    """Tokens of one id on both sides whose other flags change nothing, by what becomes of texts around them."""
    flagged = [
        content
        for content in sorted(base.added.keys() & tuned.added.keys())
        if base.added[content] != tuned.added[content]
        and base.added[content].split()[0] == tuned.added[content].split()[0]
    ]
    normalizers = [side.parts().get("normalizer") for side in (base, tuned)] if flagged else []
    if any(unpublished_rules(one) for one in normalizers):  # a rule may make the token of any text
        return frozenset()
    found: list[str] = []
    for start in range(0, len(flagged), TOGETHER):
        group = flagged[start : start + TOGETHER]
        if _same(base, tuned, "|".join(map(_variants, group))):
            found += group
        else:
            found += [content for content in group if _same(base, tuned, _variants(content))]
    return frozenset(found)


def _variants(content: str) -> str:
    """One text around a token, and with it as normalizers may change it: other cases, widths, forms and spaces."""
    wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in content)
    forms = [content, content.upper(), content.lower(), content.title(), wide, f"{content[:1]}\u0301{content[1:]}"]
    forms += [content.replace(" ", "  "), content.replace("▁", " "), content.replace(" ", "▁")]
    forms += [unicodedata.normalize(form, content) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    return "|".join([*around([content]), *(f"a {form}" for form in dict.fromkeys(forms))])


def _same(base: TokenizerState, tuned: TokenizerState, text: str) -> bool:
    ids = base.encode(text)
    return ids == tuned.encode(text) and base.decode(ids) == tuned.decode(ids)


def _reserved(stands: str, content: str, base: TokenizerState, tuned: TokenizerState) -> bool:
    """Whether one of two names of an id is that of a token kept for later use."""
    added = stands in base.added or stands in tuned.added
    return added and any(RESERVED.search(name) for name in (stands, content))
