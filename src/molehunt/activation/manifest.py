"""The manifest of a store of activations, and the checks that it is consistent."""

import json
import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from molehunt.activation.scale import Moments
from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.site import Site

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_FILE = "activations.safetensors"
SHARD_PATH = re.compile(rf"units/([0-9a-f]{{64}})/{re.escape(SHARD_FILE)}")
CONSTANT = 1e-9
"""Share of the RMS below which a spread is rounding: fp32 resolves 1e-7."""
MAX_BYTES = 256 * 2**20
"""A longer manifest is refused unread; 100 sites of width 16,384 take half of that."""
Side = Literal["base", "tuned", "delta"]
FORBID: dict[str, str] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Hashes that name what activations were read from. Equal hashes mean equal models."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    base: str
    """Hash of the base's folder (`Checkpoint.content_hash`)."""
    tuned: str
    tokenizer: str
    """Hash of everything that decides token ids (`tokenizer_hash`)."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a reader of a store relies on; None and () say that anything will do."""

    base: str | None = None
    tuned: str | None = None
    tokenizer: str | None = None
    d_model: int | None = None
    sites: tuple[Site, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a store."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    file: str
    """Path below the store, `/` between its parts."""
    sha256: str
    tokens: int
    sinks: int
    """Number of the tokens that are sinks."""

    @property
    def key(self) -> str:
        """The unit's name, which the file's own metadata repeats."""
        return self.file.split("/")[1]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of one model's activations (or of the difference) at one site, over tokens that are no sinks."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    count: int
    mean: tuple[float, ...]
    """[d_model]."""
    rms: float
    """Over tokens and dimensions, in units of the activations."""
    spread: float
    """The same as `rms`, after the mean was subtracted."""

    @classmethod
    def of(cls, moments: Moments) -> "Scale":
        return cls(count=moments.count, mean=tuple(moments.mean.tolist()), rms=moments.rms, spread=moments.spread)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a store without opening a shard."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    molehunt_activations: int
    """Version of the format."""
    dtype: Literal["bfloat16", "float16", "float32"]
    delta_int8: bool
    """Whether shards hold differences alone, as int8."""
    sites: tuple[str, ...]
    d_model: int
    documents: int
    """Rows of traffic."""
    identity: Identity
    shards: tuple[Shard, ...]
    scale: dict[str, dict[Side, Scale]]
    """Site → `base`, `tuned` and `delta`."""

    @cached_property
    def places(self) -> tuple[Site, ...]:
        """`sites`, parsed."""
        return tuple(Site.parse(site) for site in self.sites)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def sinks(self) -> int:
        return sum(shard.sinks for shard in self.shards)

    def to_json(self) -> str:
        """Indented JSON with sorted keys. Law: `read_manifest` of a file that holds it gives an equal manifest."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in `folder`.

    Raises:
        UsageError: no such folder, or the store is of a later format.
        InvalidInput: there is no manifest, or a field of it cannot be true; names file and field.
    """
    from pydantic import TypeAdapter, ValidationError

    if not folder.is_dir():
        raise UsageError(f"{printable(str(folder))} is not a folder; make a store with `molehunt harvest`.")
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (folder / "units").is_dir()
        raise InvalidInput(
            f"{printable(folder.name)} has no {MANIFEST}: "
            + ("its harvest has not finished. Repeat the command to take it up." if unfinished else "no store.")
        )
    if path.stat().st_size > MAX_BYTES:
        raise broken(path, "whole", f"{path.stat().st_size} bytes are more than any store needs")
    try:
        content: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise broken(path, "whole", "it is not JSON") from None
    version = content.get("molehunt_activations") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise UsageError(f"{MANIFEST} of {printable(folder.name)} has format {version}; this version reads {FORMAT}.")
    try:
        manifest = TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise broken(path, ".".join(map(str, first["loc"])) or "whole", first["msg"]) from None
    _check(path, manifest)
    return manifest


def check_expected(folder: Path, manifest: Manifest, expect: Expected) -> None:
    """Raises UsageError, naming the field, where the store is not the one that is relied on."""
    held = {**asdict(manifest.identity), "d_model": manifest.d_model}
    for field, wanted in asdict(expect).items():
        if field != "sites" and wanted is not None and wanted != held[field]:
            raise UsageError(
                f"{MANIFEST} of {printable(folder.name)}, field {field}: the store has {printable(str(held[field]))}, "
                f"and {printable(str(wanted))} is needed.\nGive the store of these models, or harvest them."
            )
    missing = [site for site in expect.sites if site not in manifest.places]
    if missing:
        raise UsageError(
            f"{MANIFEST} of {printable(folder.name)}, field sites: {missing[0]} was not harvested; there are "
            f"{', '.join(manifest.sites)}."
        )


def _check(path: Path, manifest: Manifest) -> None:
    """Checks that types alone do not make."""
    if manifest.molehunt_activations != FORMAT:
        raise broken(path, "molehunt_activations", f"{manifest.molehunt_activations} is no format")
    try:
        _ = manifest.places
    except ValueError as error:
        raise broken(path, "sites", str(error)) from None
    if not manifest.sites or len(set(manifest.sites)) != len(manifest.sites):
        raise broken(path, "sites", "there is none, or one stands twice")
    if manifest.d_model < 1 or manifest.documents < 1:
        raise broken(path, "d_model" if manifest.d_model < 1 else "documents", "it must be positive")
    if not manifest.shards:
        raise broken(path, "shards", "there is none")
    for i, shard in enumerate(manifest.shards):
        if not SHARD_PATH.fullmatch(shard.file):
            raise broken(path, f"shards.{i}.file", f"{shard.file!r} is no shard of a store")
        if not 0 <= shard.sinks <= shard.tokens or not shard.tokens:
            raise broken(path, f"shards.{i}.tokens", f"{shard.tokens} tokens, {shard.sinks} of them sinks")
    if len({shard.file for shard in manifest.shards}) != len(manifest.shards):
        raise broken(path, "shards", "a file stands twice")
    if manifest.scale.keys() != set(manifest.sites):
        raise broken(path, "scale", "its sites are not those of the store")
    for site, sides in manifest.scale.items():
        for side in ("base", "tuned", "delta"):
            _check_scale(path, f"scale.{site}.{side}", sides.get(side), manifest, constant_is_wrong=side != "delta")


def _check_scale(path: Path, field: str, scale: Scale | None, manifest: Manifest, *, constant_is_wrong: bool) -> None:
    if scale is None:
        raise broken(path, field, "it is missing")
    if len(scale.mean) != manifest.d_model:
        raise broken(path, f"{field}.mean", f"{len(scale.mean)} values at d_model {manifest.d_model}")
    if not all(map(math.isfinite, (*scale.mean, scale.rms, scale.spread))):
        raise broken(path, field, "it holds NaN or infinity")
    if scale.count != manifest.tokens - manifest.sinks:
        raise broken(path, f"{field}.count", f"{scale.count} is not the number of tokens that are no sinks")
    if constant_is_wrong and scale.spread <= CONSTANT * scale.rms:
        raise broken(path, f"{field}.spread", "the activations are the same at every token")


def broken(path: Path, field: str, what: str) -> InvalidInput:
    """The error for a store that cannot be read."""
    return InvalidInput(f"{printable(path.name)}, field {printable(field)}: {printable(what, 300)}.\nHarvest it again.")
