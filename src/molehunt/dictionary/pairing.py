"""How the activations of base and tuned become one input of a dictionary, and what counts as its error.

A crosscoder is a dictionary over both models' activations side by side; a Diff-SAE is one over their difference. The
joint family lies between: L = ‖e_tuned‖² + ‖e_base‖² + 2λ e_tuned·e_base, where λ = 0 is the crosscoder's error and
λ = −1 is ‖e_tuned − e_base‖², the error of the difference.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molehunt.errors import UsageError

Kind = Literal["difference", "both", "tuned", "base"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """Which activations a dictionary reads and how its error is weighed. Law: `Pairing.from_json(p.to_json()) == p`."""

    kind: Kind = "tuned"
    """`difference` is tuned − base (Diff-SAE), `both` is [base, tuned] (crosscoder)."""
    joint: float = 0.0
    """λ in [−1, 0]; for `both` alone."""
    exclusive: float = 0.0
    """Share of latents that read and write one model alone, for each model; for `both` alone. Source: arXiv 2602.11729."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a pairing is one of {', '.join(KINDS)}, got {self.kind!r}")
        if not -1 <= self.joint <= 0 or (self.joint and self.kind != "both"):
            raise UsageError(f"joint is a number from -1 to 0 and belongs to `both`; got {self.joint} for {self.kind}")
        if not 0 <= self.exclusive < 0.5 or (self.exclusive and self.kind != "both"):
            raise UsageError(
                f"exclusive is a share below 0.5 and belongs to `both`; got {self.exclusive} for {self.kind}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Pairing":
        """Raises UsageError for values out of range, TypeError for unknown fields."""
        return cls(**fields)

    @property
    def blocks(self) -> int:
        """Models side by side in one input."""
        return 2 if self.kind == "both" else 1

    @property
    def needs_base(self) -> bool:
        return self.kind != "tuned"

    def input(
        self, base: Float[Tensor, "*n d"] | None, tuned: Float[Tensor, "*n d"] | None
    ) -> Float[Tensor, "*n d_in"]:
        """The dictionary's input, in fp32."""
        if self.kind == "tuned":
            assert tuned is not None
            return tuned.float()
        assert base is not None
        if self.kind == "base":
            return base.float()
        assert tuned is not None
        if self.kind == "difference":
            return tuned.float() - base.float()
        return torch.cat([base.float(), tuned.float()], dim=-1)

    def squared_error(self, error: Float[Tensor, "tokens d_in"]) -> Float[Tensor, " tokens"]:
        """Squared error of each token, summed over the input's dimensions."""
        total = error.square().sum(-1)
        if not self.joint:
            return total
        base, tuned = error.chunk(2, dim=-1)
        return total + 2 * self.joint * (base * tuned).sum(-1)

    def mask(self, d_in: int, d_dict: int) -> Bool[Tensor, "{d_dict} {d_in}"] | None:
        """Which inputs each latent may read and write; None when all may. Base-only latents come first."""
        if not self.exclusive:
            return None
        each = round(self.exclusive * d_dict)
        mask = torch.ones(d_dict, d_in, dtype=torch.bool)
        mask[:each, d_in // 2 :] = False
        mask[each : 2 * each, : d_in // 2] = False
        return mask
