"""The result of comparing every tensor of a pair: rows, the layer × module map, and how they are shown."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args

from molehunt.direction.direction import Direction, Directions
from molehunt.errors import printable
from molehunt.model.blocks import WRITERS, Part
from molehunt.site import Site

Status = Literal["changed", "identical", "below noise floor", "not testable"]
Outcome = Literal["DIRECTIONS FOUND", "NO FINDING", "NOT TESTABLE"]
ROLES: tuple[str, ...] = get_args(Part)
WIDTH = 100
"""Columns of the table."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TensorRow:
    """What happened to one tensor."""

    tensor: str
    """Name as the checkpoint's author wrote it: print it through `printable`."""
    layer: int | None = None
    """None, like `role`, for what is no attention or MLP matrix of a decoder block: embeddings, norms, biases."""
    role: str | None = None
    status: Status
    why: str = ""
    """Reason why the tensor is not testable, or a note on its change."""
    rel_norm: float | None = None
    """‖ΔW‖ / ‖W‖; None where no difference exists."""
    floor: float | None = None
    """Spectral norm that rounding alone explains, in units of the weights."""
    strengths: tuple[float, ...] = ()
    """Singular values of ΔW above the floor, at most k."""
    z: float | None = None
    """z of the strongest direction against a random update of equal norm (`direction.chance_z`)."""
    directions: Directions | None = field(default=None, repr=False)
    """The directions, for the roles whose directions are kept."""

    def to_dict(self) -> dict[str, Any]:
        """All but the vectors, for JSON."""
        facts = asdict(replace(self, directions=None))
        del facts["directions"]
        if self.directions is not None:
            facts["share"] = self.directions.share.tolist()
            facts["residual"] = self.directions.residual.tolist()
            facts["remainder"] = self.directions.remainder
        return facts


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightComparison:
    """Every tensor of a pair, in order of layers. Directions alone accuse nobody: a clean fine-tune has them, too."""

    k: int
    seed: int
    roles: tuple[str, ...]
    matrices: tuple[TensorRow, ...]
    """Attention and MLP matrices of the decoder blocks."""
    others: tuple[TensorRow, ...]
    """All other tensors."""

    @property
    def outcome(self) -> Outcome:
        """NOT TESTABLE when something changed, or may have, and no matrix has a direction above the rounding noise."""
        if any(row.strengths for row in self.matrices):
            return "DIRECTIONS FOUND"
        if any(row.status != "identical" for row in (*self.matrices, *self.others)):
            return "NOT TESTABLE"
        return "NO FINDING"

    @property
    def exit_code(self) -> int:
        """3 when the change is not testable, else 0."""
        return 3 if self.outcome == "NOT TESTABLE" else 0

    @property
    def why(self) -> str:
        """The outcome in a sentence."""
        count = Counter(row.status for row in self.matrices)
        n = len(self.matrices)
        if self.outcome == "DIRECTIONS FOUND":
            found = sum(bool(row.strengths) for row in self.matrices)
            return f"{found} of {n} matrices changed along directions above the rounding noise.{self._rest()}"
        if self.outcome == "NO FINDING":
            return f"All {n + len(self.others)} tensors are identical, {n} matrices among them, so no direction exists."
        if count["identical"] == n:
            return (
                f"No matrix of the decoder blocks changed ({n} are identical), so there is no direction.{self._rest()}"
            )
        parts = (
            ("identical", "are identical"),
            ("below noise floor", "changed by no more than rounding explains"),
            ("changed", "changed without a direction above the noise"),
            ("not testable", "could not be compared"),
        )
        said = ", ".join(f"{count[status]} {what}" for status, what in parts if count[status])
        return f"Of {n} matrices {said}; none stands above the noise.{self._rest()}"

    def _rest(self) -> str:
        """What happened to the tensors that are no matrix of a block."""
        count = Counter(row.status for row in self.others)
        changed, untested = count["changed"] + count["below noise floor"], count["not testable"]
        return (f" Other tensors that changed (embeddings, norms, biases): {changed}." if changed else "") + (
            f" Tensors that could not be compared: {untested}." if untested else ""
        )

    def all_directions(self) -> list[Direction]:
        """Every direction kept of a matrix that writes to the residual stream, at its block's output."""
        return [d for row in self.matrices for d in _directions(row, "resid")]

    def directions_at(self, site: Site) -> list[Direction]:
        """Directions that the changed matrices of that block write to `site`, strongest z first.

        The block's output (`resid`) receives what attention output and MLP down projection write; `attn` and `mlp`
        only their own.
        """
        part = {"attn": ("o", "mix_out"), "mlp": ("down",), "resid": WRITERS}[site.stream]
        rows = [row for row in self.matrices if row.layer == site.layer and row.role in part]
        found = [d for row in rows for d in _directions(row, site.stream)]
        return sorted(found, key=lambda d: -(d.provenance.z or 0.0))

    def z_map(self) -> dict[int, dict[str, float | None]]:
        """Layer → role → z of the strongest direction; None where there is none. Of several experts, the largest."""
        found: dict[int, dict[str, float | None]] = {}
        for row in self.matrices:
            assert row.layer is not None and row.role is not None
            cells = found.setdefault(row.layer, {})
            known = cells.get(row.role)
            cells[row.role] = row.z if known is None else max(known, row.z or known)
        return dict(sorted(found.items()))

    def to_json(self) -> str:
        """All but the vectors, as a JSON object."""
        payload = {
            "schema_version": 1,
            "outcome": self.outcome,
            "why": self.why,
            "exit_code": self.exit_code,
            "k": self.k,
            "seed": self.seed,
            "roles": self.roles,
            "matrices": [row.to_dict() for row in self.matrices],
            "others": [row.to_dict() for row in self.others if row.status != "identical"],
            "identical_others": sum(row.status == "identical" for row in self.others),
            "z_map": self.z_map(),
        }
        return json.dumps(payload, indent=2, allow_nan=False)

    def to_table(self) -> str:
        """A table for people, at most 100 columns wide."""
        return "\n".join(_lines(self))

    def save_vectors(self, path: Path) -> None:
        """Write every kept matrix's `<tensor>.write`, `.read` and `.strength` to one safetensors file."""
        from safetensors.torch import save_file

        kept = [row.directions for row in self.matrices if row.directions is not None]
        save_file(
            {
                f"{found.name}.{part}": getattr(found, part).contiguous()
                for found in kept
                for part in ("write", "read", "strength")
            },
            path,
        )


def _lines(found: WeightComparison) -> list[str]:
    rows = sorted(
        (row for row in found.matrices if row.role in found.roles and row.strengths), key=lambda r: -(r.z or 0.0)
    )
    lines = [*wrap(f"{found.outcome}: {found.why}", WIDTH), ""]
    if rows:
        lines += [f"{'matrix':<50}{'‖ΔW‖/‖W‖':>10}{'σ':>9}{'σ/floor':>9}{'share':>7}{'z':>8}{'n':>4}"]
        for row in rows:
            top = row.strengths[0]
            over = f"{top / row.floor:.3g}" if row.floor else "exact"
            share = float(row.directions.share[0]) if row.directions is not None else math.nan
            lines.append(
                f"{_short(row.tensor, 49):<50}{'?' if row.rel_norm is None else f'{row.rel_norm:.1e}':>10}{top:>9.3g}{over:>9}"
                f"{share:>7.2f}{_z(row.z):>8}{len(row.strengths):>4}"
            )
        lines += [
            "",
            "σ, share of ‖ΔW‖² and z (against a random update of equal norm) of the strongest of n directions.",
            "Directions alone accuse nobody: every fine-tune has them. `molehunt audit` tests what they do.",
            "",
        ]
    elif strong := sorted({row.role for row in found.matrices if row.role and row.strengths}, key=ROLES.index):
        only = f"{', '.join(strong[:-1])} and {strong[-1]}" if len(strong) > 1 else strong[0]
        lines += [*wrap(f"Only {only} changed along directions: give --all-matrices to list them.", WIDTH), ""]
    lines += _map_lines(found)
    untested = [row for row in (*found.matrices, *found.others) if row.status == "not testable"]
    lines += _listed("not testable", [_cut(f"{_short(row.tensor, 49):<50}{row.why}", WIDTH) for row in untested])
    changed = [row for row in found.others if row.status == "changed"]
    changed.sort(key=lambda row: -(row.rel_norm or math.inf))
    return lines + _listed(
        "other changed tensors, ‖ΔW‖/‖W‖",
        [
            _cut(f"{_short(r.tensor, 49):<50}{_amount(r):>10}  {r.why if r.rel_norm else ''}".rstrip(), WIDTH)
            for r in changed
        ],
    )


def _amount(row: TensorRow) -> str:
    return f"{row.rel_norm:.1e}" if row.rel_norm else row.why


def _map_lines(found: WeightComparison) -> list[str]:
    """Layer × role: z of the strongest direction, or why there is none."""
    roles = [role for role in ROLES if any(row.role == role for row in found.matrices)]
    mark = {"identical": "=", "below noise floor": "<", "not testable": "?", "changed": ""}
    marks = {(row.layer, row.role): mark[row.status] for row in found.matrices}
    lines = [
        "z by layer (= identical, < below the noise floor, ? not testable)",
        f"{'layer':>5}" + "".join(f"{role:>9}" for role in roles),
    ]
    for layer, cells in found.z_map().items():
        shown = [_z(cells.get(role)) or marks.get((layer, role), "") for role in roles]
        lines.append(f"{layer:>5}" + "".join(f"{text:>9}" for text in shown))
    return [*lines, ""] if found.matrices else []


def _listed(title: str, items: Sequence[str], limit: int = 20) -> list[str]:
    if not items:
        return []
    more = [f"… and {len(items) - limit} more, listed by --json"] if len(items) > limit else []
    return [title, *items[:limit], *more, ""]


def _z(z: float | None) -> str:
    return "" if z is None else f"{z:.1f}" if abs(z) < 100 else f"{z:.0f}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _short(name: str, width: int) -> str:
    """A stranger's name, printable, cut at the front: the end tells matrices apart."""
    safe = printable(name, limit=4 * width)
    return safe if len(safe) <= width else "…" + safe[1 - width :]


def _directions(row: TensorRow, stream: Literal["resid", "attn", "mlp"]) -> list[Direction]:
    if row.directions is None or row.layer is None or row.role not in WRITERS:
        return []
    expert = re.search(r"experts\.(\d+)\.", row.tensor)
    source = f"weight:{row.role}" + (f".{expert[1]}" if expert else "")
    return row.directions.at(Site(row.layer, stream), source)
