"""An affine map between activation spaces, whichever way it was fitted."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molehunt.errors import InvalidInput, printable
from molehunt.model.site import Site
from molehunt.run.whole import replace_whole

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class LinearMap:
    """acts @ weight + bias, from one model's activations at `source` to another's at `target`."""

    source: Site
    target: Site
    weight: Float[Tensor, "d_source d_target"]
    bias: Float[Tensor, " d_target"]

    def __call__(self, acts: Float[Tensor, "tokens d_source"]) -> Float[Tensor, "tokens d_target"]:
        """Mapped activations, in fp32."""
        return acts.float() @ self.weight.to(acts.device, torch.float32) + self.bias.to(acts.device, torch.float32)

    def difference(
        self, plus: Float[Tensor, "tokens d_source"], minus: Float[Tensor, "tokens d_source"]
    ) -> Float[Tensor, "tokens d_target"]:
        """What a difference of activations becomes: the bias cancels."""
        return (plus.float() - minus.float()) @ self.weight.float()

    def inverse(self) -> "LinearMap":
        """The way back by pseudo-inverse, as published; a ridge of its own is the better one (see `ridge`)."""
        back = torch.linalg.pinv(self.weight.double())
        return LinearMap(self.target, self.source, back, -self.bias.double() @ back)

    def save(self, path: Path, **told: str) -> None:
        """One safetensors file, whole or not at all; `told` goes into its header beside the two sites."""
        header = {"schema": SCHEMA, "source": str(self.source), "target": str(self.target), **told}
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        replace_whole(path, lambda partial: save_file(tensors, partial, {"molehunt_map": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> "LinearMap":
        """Read what `save` wrote, bit for bit. Raises InvalidInput for anything else."""
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["molehunt_map"])
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            if header["schema"] != SCHEMA or bias.shape != weight.shape[1:]:
                raise ValueError(f"schema {header['schema']}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}")
            return cls(Site.parse(header["source"]), Site.parse(header["target"]), weight, bias)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise InvalidInput(f"{printable(path.name)} is no map of this program: {printable(str(error))}") from None
