"""Activations of a model pair on disk: a folder of safetensors shards and a manifest, read a slice at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float64
from safetensors import safe_open
from torch import Tensor

from molehunt.activation.manifest import (
    MANIFEST,
    SHARD_FILE,
    SHARD_PATH,
    Expected,
    Manifest,
    Shard,
    Side,
    broken,
    check_expected,
    read_manifest,
)
from molehunt.activation.piece import Piece, layout, unpack
from molehunt.activation.scale import all_finite
from molehunt.checkpoint.inventory import read_header
from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.unit import file_hash
from molehunt.site import Site

CODES = {
    torch.int32: "I32", torch.bool: "BOOL", torch.int8: "I8", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float32: "F32",
}  # fmt: skip
SHARD_KEY = "molehunt_shard"
"""Metadata of a shard: the unit that it was written as."""
SLICE = 1024
"""Tokens that a check of values holds at once."""


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A finished harvest. Open it with `ActivationStore.open`; shards are read only when they are needed."""

    path: Path
    manifest: Manifest
    _checked: set[int] = field(default_factory=set[int], repr=False)

    @classmethod
    def open(cls, path: str | Path, *, expect: Expected | None = None) -> "ActivationStore":
        """Check the manifest and the header of every shard. Bytes are checked when a shard is first read.

        Args:
            path: a folder written by `harvest`.
            expect: facts that the reader relies on.

        Raises:
            UsageError: no such folder, a later format, or not what `expect` says.
            InvalidInput: a file is missing, cut off, of another store or does not fit the manifest. Names file and
                field.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if expect is not None:
            check_expected(folder, manifest, expect)
        for i, shard in enumerate(manifest.shards):
            _check_header(folder, i, shard, manifest)
        listed = {shard.file for shard in manifest.shards}
        for found in sorted(folder.glob(f"units/*/{SHARD_FILE}")):
            name = found.relative_to(folder).as_posix()
            if SHARD_PATH.fullmatch(name) and name not in listed:
                raise broken(folder / MANIFEST, "shards", f"{name} is in the folder and not listed")
        return cls(folder, manifest)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.manifest.places

    @property
    def d_model(self) -> int:
        return self.manifest.d_model

    @property
    def tokens(self) -> int:
        """Tokens in all shards, sinks included."""
        return self.manifest.tokens

    def mean(self, site: Site, side: Side) -> Float64[Tensor, " d_model"]:
        """Mean activation over tokens that are no sinks."""
        return torch.tensor(self.manifest.scale[self._known(site)][side].mean, dtype=torch.float64)

    def rms(self, site: Site, side: Side) -> float:
        """Root mean square over dimensions and tokens that are no sinks."""
        return self.manifest.scale[self._known(site)][side].rms

    def read(
        self, shard: int, start: int = 0, stop: int | None = None, *, sites: Sequence[Site] | None = None
    ) -> Piece:
        """Tokens `start` to `stop` of one shard; no other part of the file is held.

        Args:
            shard: 0-based, in the order of the manifest.
            start: first token.
            stop: one after the last token; the end of the shard by default.
            sites: which sites; all by default, none gives the tokens without activations.

        Raises:
            UsageError: a site was not harvested.
            InvalidInput: the shard's bytes are not those that were written, or hold NaN or infinity.
        """
        wanted = self.sites if sites is None else tuple(sites)
        for site in wanted:
            self._known(site)
        self.verify(shard)
        return self._read(shard, start, stop, wanted)

    def pieces(self) -> Iterator[Piece]:
        """Every shard, whole, one at a time."""
        return (self.read(i) for i in range(len(self.manifest.shards)))

    def verify(self, shard: int) -> None:
        """Compare a shard with its checksum and the manifest; done once, then remembered.

        Raises InvalidInput, naming file and field, where they differ.
        """
        if shard in self._checked:
            return
        listed = self.manifest.shards[shard]
        path = self.path / listed.file
        if not path.is_file():
            raise broken(path, f"shards.{shard}.file", f"{listed.file} is missing")
        if file_hash(path) != listed.sha256:
            raise _damaged(listed, f"shards.{shard}.sha256", "its bytes are not those that were written")
        sinks = int(self._read(shard, 0, None, ()).sink.sum())
        if sinks != listed.sinks:
            raise _damaged(listed, "sink", f"{sinks} tokens are sinks, and the manifest says {listed.sinks}")
        for site in () if self.manifest.delta_int8 else self.sites:
            self._check_not_constant(shard, site)
        self._checked.add(shard)

    def _known(self, site: Site) -> str:
        if site not in self.sites:
            raise UsageError(f"{site} was not harvested; there are {', '.join(self.manifest.sites)}.")
        return str(site)

    def _read(self, shard: int, start: int, stop: int | None, sites: Sequence[Site]) -> Piece:
        listed = self.manifest.shards[shard]
        names = layout(sites, self.manifest.dtype, delta_int8=self.manifest.delta_int8)
        with safe_open(str(self.path / listed.file), framework="pt") as opened:  # pyright: ignore[reportUnknownArgumentType]
            tensors: dict[str, Tensor] = {name: opened.get_slice(name)[start:stop] for name in names}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise _damaged(listed, name, "it holds NaN or infinity")
        return unpack(tensors, sites)

    def _check_not_constant(self, shard: int, site: Site) -> None:
        """Equal rows are right only where all tokens are one and the same."""
        listed = self.manifest.shards[shard]
        first = self._read(shard, 0, 1, (site,))
        varied = {"tokens": False, "base": False, "tuned": False}
        for start in range(0, listed.tokens, SLICE):
            piece = self._read(shard, start, min(start + SLICE, listed.tokens), (site,))
            varied["tokens"] |= bool((piece.tokens != first.tokens).any())
            varied["base"] |= bool((piece.base[site] != first.base[site]).any())
            varied["tuned"] |= bool((piece.tuned[site] != first.tuned[site]).any())
            if varied["base"] and varied["tuned"]:
                return
        if varied["tokens"]:
            side = "tuned" if varied["base"] else "base"
            raise _damaged(listed, f"{side}.{site}", "the activations are the same at every token")


def _check_header(folder: Path, i: int, shard: Shard, manifest: Manifest) -> None:
    path = folder / shard.file
    if not path.is_file():
        raise _damaged(shard, f"shards.{i}.file", "the file is missing")
    try:
        entries = read_header(path)
    except InvalidInput as error:
        raise InvalidInput(f"{printable(shard.file)}: {error}") from None
    wanted = layout(manifest.places, manifest.dtype, delta_int8=manifest.delta_int8)
    odd = sorted(entries.keys() ^ wanted.keys())
    if odd:
        raise _damaged(shard, odd[0], "a shard of this store has it" if odd[0] in wanted else "it does not belong here")
    for name, (dtype, axes) in wanted.items():
        shape = (shard.tokens, manifest.d_model)[:axes]
        if (entries[name].dtype, entries[name].shape) != (CODES[dtype], shape):
            has = f"{entries[name].dtype} {list(entries[name].shape)}"
            raise _damaged(shard, name, f"it is {has}, and the manifest says {CODES[dtype]} {list(shape)}")
    with safe_open(str(path), framework="pt") as opened:  # pyright: ignore[reportUnknownArgumentType]
        key = (opened.metadata() or {}).get(SHARD_KEY)
    if key != shard.key:
        raise _damaged(shard, f"__metadata__.{SHARD_KEY}", "it was written as a shard of another harvest")


def _damaged(shard: Shard, field: str, what: str) -> InvalidInput:
    return InvalidInput(
        f"{printable(shard.file)}, field {printable(field)}: {what}.\nRepeat the harvest: it makes such a shard again."
    )
