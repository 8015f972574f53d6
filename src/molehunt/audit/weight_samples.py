"""A look at some rows of every matrix of two checkpoints: how alike they are, and what form the difference has.

A few hundred rows of each matrix are read, so 7 billion weights take less than a minute. Whether a tensor changed at all is
decided on the whole of it.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.checkpoint.loaded_view import LoadedView
from molehunt.checkpoint.noise_floor import rounding_of
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable, printable
from molehunt.model.blocks import module_role
from molehunt.run.counting import counted
from molehunt.run.progress import Track, silent

ROWS, BLOCKS = 192, 3
"""Number of rows that are read of a matrix, in so many runs of neighbouring rows."""
MATRICES = 400
"""Greatest number of matrices that are sampled: of a mixture of experts, some of each layer's."""
SLICE_ROWS = 8192
"""Number of rows of a matrix that are subtracted at a time."""
ITERATIONS = 6
"""Number of steps of the subspace iteration for σ₁."""
SMALL, LARGE = 2**22, 24
"""Number of entries up to which the stable rank of a matrix is always computed, and of how many larger ones it is."""
WRAPPERS = re.compile(
    r"^((base_model|model|language_model|text_model|transformer|backbone|decoder|module|_orig_mod)\.)+"
)
"""Prefixes that wrappers put before the name of a tensor."""
Group = Literal["block", "vocabulary", "other"]
Form = Literal["low rank", "high rank", "rounding", "unclear"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixSample:
    """Some rows of a matrix in both checkpoints."""

    name: str
    correlation: float
    """Pearson's correlation of the entries; 0 between matrices that have nothing to do with each other."""
    relative: float
    """‖ΔW‖ / ‖W‖ in these rows."""
    rank: int
    """Number of singular values of ΔW above what rounding explains."""
    full_rank: int
    stable_rank: float | None
    """‖ΔW‖² of the whole matrix over the square of its largest singular value; 0 where nothing stands above the rounding.

    None where it was not computed: of large matrices, for some only."""
    explained: float
    """Share of ‖ΔW‖² in these singular values."""
    beyond: float
    """Share of ‖ΔW‖² that neither these singular values nor rounding explain."""

    @property
    def form(self) -> Form:
        """The form of the change: of low rank as LoRA makes it, of high rank, within rounding, or none of them surely."""
        if not self.rank:
            return "rounding"
        few = self.rank <= self.full_rank / 4
        if few and self.beyond <= 0.1 and self.explained >= 0.3:
            return "low rank"
        return "high rank" if not few or self.beyond > 0.25 else "unclear"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSurvey:
    """What was seen of two checkpoints."""

    paired: int
    """Number of tensors that both have."""
    alone: int
    """Number of tensors that only one of them has."""
    changed: tuple[str, ...]
    """Tensors whose values differ anywhere."""
    unread: tuple[str, ...]
    """Tensors in a quantisation that cannot be undone exactly, and not stored alike on both sides: they may have changed."""
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Matrices of different shapes, which is more than a resized vocabulary explains."""
    samples: tuple[MatrixSample, ...]
    """The matrices that were looked at and had changed."""
    same: int
    """Number of the matrices to look at that had not changed."""
    unsampled: int
    """Number of matrices that changed and could not be looked at, most because they hold NaN or infinity."""
    nonfinite: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Tensors of the base and of the fine-tune that hold NaN or infinity."""


def survey(base: Checkpoint, tuned: Checkpoint, track: Track = silent) -> TensorSurvey:
    """Compare every tensor of two model folders by its values, and look at some rows of the matrices.

    Tensors are paired by their stored names, without the prefixes of wrappers.
    """
    pairs, alone = paired_tensors(base, tuned)
    used = Counter(name for name, _ in pairs)
    matrices = [pair for pair in pairs if len(base.shape(pair[0])) >= 2]
    chosen = set(_spread_over(matrices, MATRICES))
    large = [pair for pair in matrices if pair in chosen and math.prod(base.shape(pair[0])) > SMALL]
    skipped = set(large) - set(_spread_over(large, LARGE))
    changed: list[str] = []
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    samples: list[MatrixSample] = []
    unread: list[str] = []
    unsampled = same = 0
    for pair in track(pairs, "comparing with the base", len(pairs)):
        name, theirs = pair
        own_name = used[name] < 2 or WRAPPERS.sub("", name) == WRAPPERS.sub("", theirs)
        shown = name if own_name else theirs  # the base ties it to a tensor of another name
        shapes = base.shape(name), tuned.shape(theirs)
        equal = _equal(base, tuned, name, theirs) if shapes[0] == shapes[1] else False
        packed = name in base.packed or theirs in tuned.packed
        if equal is None or (packed and shapes[0] != shapes[1]):
            unread.append(shown)
            continue
        if equal:
            same += pair in chosen
            continue
        changed.append(shown)
        if shapes[0] != shapes[1] and not _resized(name, *shapes):
            mismatched.append((name, *shapes))
            continue
        if pair in chosen:
            try:
                sample = _sample(base, tuned, name, theirs, whole=pair not in skipped)
            except (NotTestable, InvalidInput):
                unsampled += 1
                continue
            samples += [sample] if sample is not None else []
    return TensorSurvey(
        paired=len(pairs),
        alone=alone,
        changed=tuple(changed),
        unread=tuple(unread),
        mismatched=tuple(mismatched),
        samples=tuple(samples),
        same=same,
        unsampled=unsampled,
        nonfinite=(nonfinite_tensors(base), nonfinite_tensors(tuned)),
    )


def nonfinite_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the stored tensors that hold NaN or infinity. What is packed by quantisation holds neither."""
    return tuple(name for name in checkpoint.names() if not _finite(checkpoint.stored(name)))


def nonfinite_said(side: str, names: Sequence[str]) -> str:
    """What to say of a side some of whose tensors hold NaN or infinity."""
    shown = ", ".join(printable(name, 80) for name in names[:3]) + (", …" if len(names) > 3 else "")
    verb = "holds" if len(names) == 1 else "hold"
    return f"{counted(len(names), 'tensor')} of {side} {verb} NaN or infinity ({shown}): answers of this model would be void"


def _finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. Both survive a sum, which is quicker than a look at each number."""
    if not value.is_floating_point() or math.isfinite(float(torch.atleast_1d(value).flatten().float().sum())):
        return True
    return all(bool(rows.float().isfinite().all()) for rows in torch.atleast_1d(value).split(1024))


def paired_tensors(base: Checkpoint, tuned: Checkpoint) -> tuple[list[tuple[str, str]], int]:
    """The names in both checkpoints of the tensors that both have, and how many only one has.

    Of tensors that a folder holds with and without a wrapper's prefix, the one that transformers loads is taken. A tensor
    that one folder stores and the other ties is compared with what the other uses in its place.
    """
    left, right = (_unwrapped(side) for side in (base, tuned))
    left, right = left | _tied(base, right.keys() - left.keys()), right | _tied(tuned, left.keys() - right.keys())
    shared = sorted(left.keys() & right.keys())
    return [(left[key], right[key]) for key in shared], len(left.keys() ^ right.keys())


def _unwrapped(checkpoint: Checkpoint) -> dict[str, str]:
    """Name without the prefixes of wrappers → stored name."""
    names = checkpoint.names()
    found = {WRAPPERS.sub("", name): name for name in names}
    if len(found) == len(names):
        return found
    try:
        unread = frozenset(LoadedView.of(checkpoint).unread)
    except NotTestable:  # nothing says which of the two is loaded
        return found
    return found | {WRAPPERS.sub("", name): name for name in names if name not in unread}


def _tied(checkpoint: Checkpoint, wanted: Collection[str]) -> dict[str, str]:
    """Those of `wanted`, without the prefixes of wrappers, that a folder ties to another tensor → the stored name of that."""
    if not wanted:
        return {}
    try:
        view = LoadedView.of(checkpoint)
    except NotTestable:  # nothing says what is tied
        return {}
    tied = {WRAPPERS.sub("", name): view.sources(source) for name, source in view.tied.items()}
    return {name: next(iter(stored)) for name, stored in tied.items() if name in wanted and len(stored) == 1}


def group_of(name: str, model_type: str) -> Group:
    """Whether a tensor is a matrix of a block, of the vocabulary, or something else, such as a norm."""
    if module_role(name, model_type) is not None:
        return "block"
    return "vocabulary" if is_vocabulary(name) else "other"


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row for each token."""
    return (
        re.search(r"(embed|wte|word_embeddings|lm_head|output_layer|unembed)", name) is not None
        and "layers." not in name
    )


def _spread_over(pairs: Sequence[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """At most so many of the pairs, evenly over their sorted names, so that every layer and part is among them."""
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[i * len(pairs) // most] for i in range(most)]


def _resized(name: str, shape: tuple[int, ...], shape_after: tuple[int, ...]) -> bool:
    return is_vocabulary(name) and shape[1:] == shape_after[1:]


def _equal(base: Checkpoint, tuned: Checkpoint, name: str, theirs: str) -> bool | None:
    """Whether two tensors of one shape hold the same values; in one format, the same bits. None where nobody can say."""
    if base.quantisation is not None or tuned.quantisation is not None:
        if _stored_alike(base, tuned, name, theirs):
            return True
        try:
            return torch.equal(base.tensor(name).float(), tuned.tensor(theirs).float())
        except NotTestable:
            return None
        except InvalidInput:  # NaN or infinity: the sentence on the kind of change says so
            return False
    one, other = torch.atleast_1d(base.stored(name)), torch.atleast_1d(tuned.stored(theirs))
    if one.dtype == other.dtype:
        return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    pairs = zip(one.split(1024), other.split(1024), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def _stored_alike(base: Checkpoint, tuned: Checkpoint, name: str, theirs: str) -> bool:
    """Whether two quantised weights have the same settings and the same bits, so that any loader makes the same of both."""
    if (
        base.quantisation is None
        or tuned.quantisation is None
        or base.quantisation.settings != tuned.quantisation.settings
    ):
        return False
    ours, others = base.stored_parts(name), tuned.stored_parts(theirs)
    return ours.keys() == others.keys() and all(_same_bits(ours[part], others[part]) for part in ours)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(torch.atleast_1d(side).contiguous().view(torch.uint8) for side in (one, other)))


def _sample(base: Checkpoint, tuned: Checkpoint, name: str, theirs: str, *, whole: bool) -> MatrixSample | None:
    """Some rows of a matrix in both; None where one side has zeros only, so that nothing can be like it.

    Args:
        base: the base.
        tuned: the fine-tune.
        name: the matrix's name in the base.
        theirs: its name in the fine-tune.
        whole: whether the stable rank is computed, on the whole matrix: rows alone would give another one.
    """
    rows = min(base.shape(name)[0], tuned.shape(theirs)[0])
    before, after = (_rows(side, one, rows) for side, one in ((base, name), (tuned, theirs)))
    size = float(before.double().norm())
    correlation = float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1])
    if not size or math.isnan(correlation):
        return None
    change = (after - before).double()
    energy = float(change.square().sum())
    gram = change @ change.mT if change.shape[0] <= change.shape[1] else change.mT @ change
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
    quantised = math.hypot(base.rounding(name), tuned.rounding(theirs))
    types = base.dtype(name), tuned.dtype(theirs)
    rounded = [rounding_of(rows, dtype) for rows, dtype in zip((before, after), types, strict=True)]
    floor = math.hypot(rounded[0][0], rounded[1][0], quantised)
    rank = int((values > floor).sum())
    above = float(values[:rank].square().sum())
    rounding = rounded[0][1] + rounded[1][1]
    return MatrixSample(
        name=name,
        correlation=correlation,
        relative=math.sqrt(energy) / size,
        rank=rank,
        full_rank=len(values),
        stable_rank=(_stable_rank(base, tuned, name, theirs, rows) if whole else None) if rank else 0.0,
        explained=above / energy if energy else 0.0,
        beyond=0.0 if quantised or not energy else max(0.0, energy - above - 1.5 * rounding) / energy,
    )


def _rows(checkpoint: Checkpoint, name: str, limit: int) -> Float[Tensor, "rows columns"]:
    """Runs of rows, evenly over the first `limit` ones, in fp32; of a stack of matrices, of the first one."""
    length = ROWS // BLOCKS
    starts = [0] if limit <= ROWS else [i * (limit - length) // (BLOCKS - 1) for i in range(BLOCKS)]
    length = limit if limit <= ROWS else length
    stored = _values(checkpoint, name)
    if stored.ndim > 2:
        stored, starts, length = stored.flatten(0, -2), [0], min(ROWS, math.prod(stored.shape[:-1]))
    found = torch.cat([stored[start : start + length].float() for start in starts])
    if not bool(found.isfinite().all()):
        raise InvalidInput(f"{name} holds NaN or infinity")
    return found


def _stable_rank(base: Checkpoint, tuned: Checkpoint, name: str, theirs: str, rows: int) -> float:
    """‖ΔW‖² over σ₁² of the whole matrix, or of the first one of a stack. σ₁ is at most 2 % too small.

    The difference is made slice by slice: of a large vocabulary, it alone would take gigabytes. σ₁ comes from subspace
    iteration (Halko et al., SIAM Review 53 (2011), algorithm 4.4).
    """
    sides = [_values(side, one) for side, one in ((base, name), (tuned, theirs))]
    before, after = ((one if one.ndim == 2 else one.flatten(0, -3)[0])[:rows] for one in sides)

    def slices() -> Iterator[Float[Tensor, "rows columns"]]:
        for one, other in zip(before.split(SLICE_ROWS), after.split(SLICE_ROWS), strict=True):
            yield other.float() - one.float()

    columns = before.shape[1]
    basis = torch.randn(columns, min(8, *before.shape), generator=torch.Generator().manual_seed(0))
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(torch.stack([part.mT @ (part @ basis) for part in slices()]).sum(0)).Q
    reached = torch.stack([(part @ basis).mT @ (part @ basis) for part in slices()]).sum(0)
    largest = float(torch.linalg.eigvalsh(reached.double())[-1])
    energy = sum(float(part.square().sum(dtype=torch.float64)) for part in slices())
    return energy / largest if largest > 0 else 0.0


def _values(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as stored, dequantised if need be."""
    return checkpoint.stored(name) if checkpoint.quantisation is None else checkpoint.tensor(name)
