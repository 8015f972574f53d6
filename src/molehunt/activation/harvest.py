"""One pass of traffic through a model pair, for all sites at once: to a store on disk, or as pieces in memory."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from molehunt import __version__
from molehunt.activation.batching import Batch, documents_of, plan
from molehunt.activation.manifest import CONSTANT, FORMAT, MANIFEST, SHARD_FILE, Identity, Manifest, Scale, Shard, Side
from molehunt.activation.piece import DTYPES, Piece, pack, unpack
from molehunt.activation.scale import Moments, all_finite, sinks
from molehunt.activation.store import SHARD_KEY, ActivationStore
from molehunt.errors import InvalidInput, NotTestable, UsageError, printable
from molehunt.model.blocks import unwrapped
from molehunt.model.pair import ModelPair
from molehunt.run.folder import RunFolder
from molehunt.run.progress import Tally, Track, counting, silent
from molehunt.run.unit import CHECKSUMS, Units, unit_key
from molehunt.site import Site

SHARD_TOKENS = 16_384
"""At d_model 4096 a shard of bf16 pairs then takes 256 MiB per site."""
BATCH_TOKENS = 4096
"""Padded positions that go through the models at once."""
MOMENTS_FILE = "moments.safetensors"
SIDES: tuple[Side, ...] = get_args(Side)
AllMoments = dict[tuple[Site, Side], Moments]


@dataclass(frozen=True, eq=False, kw_only=True)
class _HarvestPass:
    """What is read of which rows, and how it is stored."""

    pair: ModelPair
    rows: Sequence[Sequence[int]]
    sites: Sequence[Site]
    dtype: str
    delta_int8: bool

    def settings(self, identity: Identity) -> dict[str, Any]:
        """What changes the bytes of a shard, besides its rows."""
        with self.pair.tuned_model() as model:
            computed_in = str(next(model.parameters()).dtype)
        return {
            "sites": [str(site) for site in self.sites],
            "dtype": self.dtype,
            "delta_int8": self.delta_int8,
            "computed_in": computed_in,
            "identity": asdict(identity),
        }

    def key(self, settings: Mapping[str, Any], batches: Sequence[Batch]) -> str:
        """Address of the shard that holds these batches."""
        return unit_key(
            {**settings, "batches": [[batch.width, batch.documents] for batch in batches]},
            {"rows": _rows_hash(self.rows, documents_of(batches))},
        )

    def write_shard(self, batches: Sequence[Batch], key: str, folder: Path, done: Tally) -> None:
        """Read the batches, and write their activations and moments into the shard's folder."""
        tensors, found = _read_shard(
            self.pair, self.rows, batches, self.sites, self.dtype, delta_int8=self.delta_int8, done=done
        )
        save_file(tensors, folder / SHARD_FILE, metadata={SHARD_KEY: key})
        save_file(_moments_to_tensors(found), folder / MOMENTS_FILE)


def harvest(
    pair: ModelPair,
    rows: Sequence[Sequence[int]],
    *,
    sites: Sequence[Site],
    into: Path,
    identity: Identity,
    dtype: str = "bfloat16",
    delta_int8: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    track: Track = silent,
) -> ActivationStore:
    """Read both models' activations once and write them to a store.

    Each shard is written whole or not at all. The same call after an interruption makes what is missing, and ends with
    the same bytes as a run that was never interrupted.

    Args:
        pair: the two models.
        rows: token ids of each row of traffic.
        sites: where to read.
        into: the store's folder.
        identity: hashes that name the pair (see `identify`).
        dtype: the dtype in which activations are stored: bfloat16, float16 or float32.
        delta_int8: store the difference alone, as int8 with one scale per token: a quarter of the size.
        shard_tokens: greatest number of tokens in a file (one long row may exceed it).
        batch_tokens: greatest number of padded positions that go through the models at once (likewise).
        track: shows rows.

    Raises:
        UsageError: rows, sites or dtype cannot be read, or `into` holds something else.
        NotTestable: fewer than two tokens are no sinks.
        InvalidInput: a model gives NaN, infinity, or the same activations at every token. Names model and site.
        CannotTap: a site cannot be read (see `read_sites`).
    """
    _check(pair, rows, sites, dtype)
    if delta_int8 and dtype != "bfloat16":
        raise UsageError(f"dtype {dtype} does not apply to int8 differences; give one or the other.")
    one = _HarvestPass(pair=pair, rows=rows, sites=sites, dtype=dtype, delta_int8=delta_int8)
    shards = plan(rows, shard_tokens=shard_tokens, batch_tokens=batch_tokens, longest=_positions(pair))
    settings = one.settings(identity)
    sizes = {"shard_tokens": shard_tokens, "batch_tokens": batch_tokens, "rows": _rows_hash(rows, range(len(rows)))}
    run = RunFolder.create(into, {"command": "harvest", "version": __version__, **settings, **sizes})
    listed, moments = _write_shards(one, shards, settings, run.units, track)
    _check_moments(moments)
    manifest = Manifest(
        molehunt_activations=FORMAT,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        delta_int8=delta_int8,
        sites=tuple(map(str, sites)),
        d_model=pair.d_model,
        documents=len(rows),
        identity=identity,
        shards=tuple(listed),
        scale={str(site): {side: Scale.of(moments[site, side]) for side in SIDES} for site in sites},
    )
    run.write_env()
    run.write_text(MANIFEST, manifest.to_json())
    return ActivationStore.open(into)


def _write_shards(
    one: _HarvestPass, shards: Sequence[Sequence[Batch]], settings: Mapping[str, Any], units: Units, track: Track
) -> tuple[list[Shard], AllMoments]:
    """Write the shards that are not there, and gather the entries and the moments of all."""
    moments: AllMoments = {(site, side): Moments.empty(one.pair.d_model) for site in one.sites for side in SIDES}
    listed: list[Shard] = []
    keys = [one.key(settings, batches) for batches in shards]
    finished = sum(
        len(documents_of(batches)) for batches, key in zip(shards, keys, strict=True) if units.path(key).exists()
    )
    with counting(track, "harvesting activations", len(one.rows), start=finished) as done:
        for batches, key in zip(shards, keys, strict=True):
            unit = units.run(key, partial(one.write_shard, batches, key, done=done))
            found = _moments_from_tensors(load_file(unit / MOMENTS_FILE), one.sites)
            moments = {at: whole.merge(found[at]) for at, whole in moments.items()}
            tokens = sum(len(one.rows[document]) for document in documents_of(batches))
            listed.append(
                Shard(
                    file=f"units/{key}/{SHARD_FILE}",
                    sha256=_written_checksum(unit),
                    tokens=tokens,
                    sinks=tokens - found[one.sites[0], "base"].count,
                )
            )
    return listed, moments


def stream(
    pair: ModelPair,
    rows: Sequence[Sequence[int]],
    sites: Sequence[Site],
    *,
    dtype: str = "bfloat16",
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    track: Track = silent,
) -> Iterator[Piece]:
    """Yield what `harvest` would store, shard by shard, and write nothing.

    Law: the pieces are those of `harvest(…).pieces()` with the same arguments, bit for bit.

    Raises: as `harvest`, except that activations which are the same at every token are not noticed.
    """
    _check(pair, rows, sites, dtype)
    shards = plan(rows, shard_tokens=shard_tokens, batch_tokens=batch_tokens, longest=_positions(pair))
    return _stream(pair, rows, shards, sites, dtype, track)


def _stream(
    pair: ModelPair,
    rows: Sequence[Sequence[int]],
    shards: Sequence[Sequence[Batch]],
    sites: Sequence[Site],
    dtype: str,
    track: Track,
) -> Iterator[Piece]:
    with counting(track, "reading activations", len(rows)) as done:
        for batches in shards:
            found = _read_shard(pair, rows, batches, sites, dtype, delta_int8=False, moments=False, done=done)
            yield unpack(found[0], sites)


def _read_shard(
    pair: ModelPair,
    rows: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    sites: Sequence[Site],
    dtype: str,
    *,
    delta_int8: bool,
    moments: bool = True,
    done: Tally,
) -> tuple[dict[str, Tensor], AllMoments]:
    """The tensors of a shard, and the moments of its activations before they were rounded (empty unless `moments`).

    `done` is called with the number of rows of each batch.
    """
    total = sum(len(rows[document]) for document in documents_of(batches))
    whole: dict[str, Tensor] = {}
    found: AllMoments = {(site, side): Moments.empty(pair.d_model) for site in sites for side in SIDES}
    at = 0
    for batch in batches:
        piece = _read_batch(pair, rows, batch, sites)
        packed = pack(piece, dtype, delta_int8=delta_int8)
        for name, part in packed.items():
            if part.is_floating_point() and not all_finite(part):
                raise UsageError(f"{name} holds values that {dtype} cannot; store bfloat16 or float32.")
            if name not in whole:
                whole[name] = torch.empty(total, *part.shape[1:], dtype=part.dtype)
            whole[name][at : at + len(part)] = part
        content = ~piece.sink
        for site in sites if moments else ():
            base, tuned = piece.base[site][content], piece.tuned[site][content]
            acts_of: dict[Side, Tensor] = {"base": base, "tuned": tuned, "delta": tuned.float() - base.float()}
            for side, acts in acts_of.items():
                found[site, side] = found[site, side].merge(Moments.of(acts))
        at += len(piece.tokens)
        done(len(batch.documents))
    return whole, found


def _read_batch(pair: ModelPair, rows: Sequence[Sequence[int]], batch: Batch, sites: Sequence[Site]) -> Piece:
    """All real tokens of a batch, in the models' dtype and on their device."""
    reading = pair.read([rows[document] for document in batch.documents], sites=sites, pad_to=batch.width)
    mask = reading.mask
    documents = torch.tensor(batch.documents, device=mask.device)[:, None].expand_as(mask)
    sink = torch.zeros_like(mask)
    for side, acts_at in (("base", reading.base), ("tuned", reading.tuned)):
        for site in sites:
            if not all_finite(acts_at[site]):  # padding may be what is not
                broken = mask & ~acts_at[site].isfinite().all(dim=-1)
                if bool(broken.any()):
                    raise InvalidInput(
                        f"{side}.{site}: the {side} model gives NaN or infinity in row "
                        f"{int(documents[broken][0]) + 1} of the traffic.\n"
                        "Its weights are damaged, or too large for the dtype that it runs in."
                    )
            sink |= sinks(acts_at[site], mask)
    return Piece(
        tokens=reading.tokens[mask].int(),
        document=documents[mask].int(),
        position=(mask.cumsum(1) - 1)[mask].int(),
        sink=sink[mask],
        base={site: reading.base[site][mask] for site in sites},
        tuned={site: reading.tuned[site][mask] for site in sites},
    )


def _check(pair: ModelPair, rows: Sequence[Sequence[int]], sites: Sequence[Site], dtype: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {printable(dtype)!r}.")
    if not sites or len(set(sites)) != len(sites):
        raise UsageError("sites must name at least one site, and none twice.")
    for site in sites:
        if site.layer >= pair.n_layers:
            raise UsageError(f"sites: there is no {site}; the models have blocks L0 to L{pair.n_layers - 1}.")
    if not rows:
        raise UsageError("the traffic has no rows, so there is nothing to harvest.")
    longest = _positions(pair)
    for number, row in enumerate(rows, 1):
        if not row:
            raise UsageError(f"row {number} of the traffic has no tokens.")
        if longest is not None and len(row) > longest:
            raise UsageError(f"row {number} of the traffic has {len(row)} tokens; the models read {longest} at most.")
        if min(row) < 0 or max(row) >= pair.vocab_size:
            raise UsageError(
                f"row {number} of the traffic has token ids outside 0 to {pair.vocab_size - 1}: another tokenizer's."
            )


def _positions(pair: ModelPair) -> int | None:
    with pair.tuned_model() as model:
        config: Any = unwrapped(model).config
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _check_moments(moments: AllMoments) -> None:
    for (site, side), found in moments.items():
        if found.count < 2:
            raise NotTestable("the traffic has fewer than two tokens that are no sinks: nothing can be scaled by them.")
        if side != "delta" and found.spread <= CONSTANT * found.rms:
            raise InvalidInput(f"{side}.{site}: the {side} model's activations are the same at every token.")


def _rows_hash(rows: Sequence[Sequence[int]], documents: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document}:{','.join(map(str, rows[document]))}\n".encode())
    return digest.hexdigest()


def _written_checksum(unit: Path) -> str:
    lines = (unit / CHECKSUMS).read_text().splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}[SHARD_FILE]


def _moments_to_tensors(moments: AllMoments) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (site, side), found in moments.items():
        name = f"{side}.{site}"
        count = torch.tensor([found.count])
        tensors |= {f"{name}.count": count, f"{name}.mean": found.mean, f"{name}.scatter": found.scatter}
    return tensors


def _moments_from_tensors(tensors: dict[str, Tensor], sites: Sequence[Site]) -> AllMoments:
    return {
        (site, side): Moments(
            int(tensors[f"{side}.{site}.count"]), tensors[f"{side}.{site}.mean"], tensors[f"{side}.{site}.scatter"]
        )
        for site in sites
        for side in SIDES
    }
