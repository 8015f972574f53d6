"""The verdict of a watch on one row: one line of `verdicts.jsonl`, which has no text of the row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RowVerdict:
    """The verdict on one answer, in either mode."""

    line: int
    """Number of the row in its log, counted from 1."""
    tag: str
    """Tag that the owner of the log gave the row."""
    flagged: bool
    score: float
    """Nats of rarity among clean answers; in the published mode, the cosine by which the range is left."""
    p_value: float | None
    """Share of clean answers that score at least as high; None in the published mode."""
    direction: str
    """Name of the column that contributes most, such as `L3 down #0 written`."""
    side: Literal["high", "low"]
    """The end of that column at which the answer lies."""
    prefix_checkpoint: int | None
    """Index j of the prefix of 2^j answer tokens that scored highest; None in the published mode."""
    token: int
    """Index of the token with the top-scoring value, counted through prompt and answer."""
    tokens: int
    """Number of tokens of prompt and answer."""
    coverage: float
    """Share of the tokens that were scored."""
    within_calibration: bool | None
    """False for an answer longer than the clean ones, whose rate is not promised; None in the published mode."""
    left_out: int = 0
    """Number of tokens by which the prompt was cut, because the model cannot read all of it."""
    logged: bool | None = None
    """Whether the answer was logged; otherwise the model generated it. None in the files of older versions."""

    def to_dict(self) -> dict[str, Any]:
        """The fields of one line of `verdicts.jsonl`; `left_out` only where a prompt was cut, `logged` where it is known."""
        fields = asdict(self)
        if not self.left_out:
            del fields["left_out"]
        if self.logged is None:
            del fields["logged"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RowVerdict":
        """Read one line of `verdicts.jsonl`, also one in which older versions wrote `look` for `prefix_checkpoint`.

        Raises:
            KeyError: a field is missing.
        """
        defaults: dict[str, Any] = {"left_out": 0, "logged": None}
        renamed = {**defaults, **fields, "prefix_checkpoint": fields.get("prefix_checkpoint", fields.get("look"))}
        return cls(**{name: renamed[name] for name in cls.__dataclass_fields__})
