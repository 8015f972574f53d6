"""Activations with structure that a dictionary can find, and stores of any size that are written fast."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.activation.manifest import FORMAT, MANIFEST, SHARD_FILE, Identity, Manifest, Scale, Shard, Side
from molehunt.activation.piece import COLUMNS
from molehunt.activation.scale import Moments
from molehunt.activation.store import SHARD_KEY
from molehunt.site import Site

SITE = Site(0)
SHARD_TOKENS = 16_384
UNNAMED = "0" * 64


@dataclass(frozen=True, eq=False)
class Planted:
    """Each token is a sum of some of `atoms` [atoms d], drawn by a power law, plus noise and an offset; RMS near 1."""

    atoms: Tensor
    active: int = 20
    noise: float = 0.2
    offset: float = 0.3

    @classmethod
    def of(cls, d: int, per_dim: int = 8) -> "Planted":
        rng = torch.Generator().manual_seed(4711)
        return cls(normalize(torch.randn(per_dim * d, d, generator=rng), dim=1))

    def draw(self, tokens: int, seed: int) -> Tensor:
        """[tokens d]."""
        rng = torch.Generator().manual_seed(seed)
        count, d = self.atoms.shape
        which = (count * torch.rand(tokens, self.active, generator=rng) ** 2).long()  # frequency falls as i^-½
        size = 0.3 + torch.rand(tokens, self.active, generator=rng).square()
        found = torch.empty(tokens, d)
        for start in range(0, tokens, 1024):
            part = slice(start, start + 1024)
            found[part] = (size[part, :, None] * self.atoms[which[part]]).sum(1)
        found *= (d / (self.active * 0.47)) ** 0.5
        return found + self.noise * torch.randn(tokens, d, generator=rng) + self.offset


def write_store(folder: Path, blocks: Iterable[tuple[Tensor, Tensor]], *, copies: int = 1) -> int:
    """A store with `copies` shards of each block (base, tuned), both [tokens d], in bf16; gives its bytes.

    A block is encoded once; only the shard's name differs between copies.
    """
    moments: dict[Side, Moments] = {}
    listed: list[Shard] = []
    size, d_model = 0, 0
    for i, (base, tuned) in enumerate(blocks):
        d_model = base.shape[1]
        of: dict[Side, Tensor] = {"base": base.bfloat16(), "tuned": tuned.bfloat16()}
        tensors = {name: torch.zeros(len(base), dtype=dtype) for name, dtype in COLUMNS.items()}
        tensors["tokens"] += torch.arange(len(base), dtype=torch.int32)
        content = save(tensors | {f"{side}.{SITE}": acts for side, acts in of.items()}, {SHARD_KEY: UNNAMED})
        head = 8 + int.from_bytes(content[:8], "little")
        for copy in range(copies):
            key = hashlib.sha256(f"{i}/{copy}".encode()).hexdigest()
            parts = (content[:head].replace(UNNAMED.encode(), key.encode()), memoryview(content)[head:])
            digest = hashlib.sha256()
            (folder / "units" / key).mkdir(parents=True)
            with (folder / "units" / key / SHARD_FILE).open("wb") as file:
                for part in parts:
                    digest.update(part)
                    size += file.write(part)
            shard = Shard(file=f"units/{key}/{SHARD_FILE}", sha256=digest.hexdigest(), tokens=len(base), sinks=0)
            listed.append(shard)
        of["delta"] = of["tuned"].float() - of["base"].float()
        for side, acts in of.items():
            found = Moments.of(acts)
            found = Moments(copies * found.count, found.mean, copies * found.scatter)
            moments[side] = moments.get(side, Moments.empty(d_model)).merge(found)
    manifest = Manifest(
        molehunt_activations=FORMAT,
        dtype="bfloat16",
        delta_int8=False,
        sites=(str(SITE),),
        d_model=d_model,
        documents=1,
        identity=Identity(base="synthetic", tuned="synthetic", tokenizer="synthetic"),
        shards=tuple(listed),
        scale={str(SITE): {side: Scale.of(found) for side, found in moments.items()}},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return size
