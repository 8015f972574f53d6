"""Permanent fixes: low-rank changes of the tuned weights, made from what the audit flagged.

- *Subtraction* takes flagged singular directions of the fine-tune's change back: W − Σ sᵢ uᵢ vᵢᵀ. With all of them the
  base is there again.
- *Orthogonalisation* (Arditi et al., arXiv 2406.11717, §2.4) lets nothing write a direction r any more: (I − r rᵀ)W for
  every matrix and bias that writes to the residual stream, embeddings included.

Nothing is read here but names, shapes and what a projection needs of a norm; `saved_model` applies the edits and writes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.checkpoint.reader import Checkpoint
from molehunt.direction.direction import Directions
from molehunt.direction.weight import SLICE
from molehunt.errors import NotTestable, UsageError, printable
from molehunt.model.blocks import ATTENTION, MLP, module_role
from molehunt.steer.ablate import orthonormal


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a tensor as it is stored: `left @ right` is added, which is one column wide for a bias."""

    left: Float[Tensor, "rows k"]
    right: Float[Tensor, "k cols"]


Edits = Mapping[str, Callable[[Tensor], LowRank]]
"""For each tensor name, a function from the stored value to the change that is added to it."""

POST_NORMS: Mapping[str, float] = {"gemma2": 1.0, "gemma3": 1.0, "gemma3_text": 1.0, "olmo2": 0.0, "olmo3": 0.0}
"""Model types that norm what attention and MLP return before it is added; their gain is this plus the norm's weight."""
_AFTER = {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"}
"""The norm behind a writer in those."""
_BEFORE = frozenset(
    ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "ln_1", "ln_2", "ln_attn", "ln_mlp"]
)
"""Norms of what a block reads. Llama's `post_attention_layernorm` is one, where `POST_NORMS` does not say otherwise."""
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|embed_in|word_embeddings|wte|wpe)\.weight")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight")
_READS = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|norm|ln_f|final_layer_norm|final_layernorm)\.(?:weight|bias)")
_IN_BLOCK = re.compile(r"(?P<block>(?:.*\.)?(?:layers|h)\.\d+)\.(?P<module>\w+)\.(?P<rest>.+)")
_LIKE_A_WRITER = re.compile(r"(?:^|[._])(?:down|out|dense|o_proj|c_proj|w2)")


def subtraction(
    tuned: Checkpoint, flagged: Iterable[Directions], chosen: Mapping[str, Sequence[int]] | None = None
) -> Edits:
    """Take singular directions of `tuned - base` out of the tuned weights.

    Args:
        tuned: a folder of full weights.
        flagged: directions of its matrices, from `compare_weights`.
        chosen: for each tensor name, the ranks of its directions, 0 the strongest; all flagged ones by default.

    Raises:
        UsageError: a matrix that the model does not have, or of another shape; no such direction, or an empty one.
        NotTestable: the weights are an adapter or quantised (see `plain_weights`).

    Source: low-rank truncation of the weight difference, as WeightWatch (arXiv 2508.00161) reads it.
    """
    plain_weights(tuned)
    given = {one.name: one for one in flagged}
    unknown = sorted({*(chosen or {})} - {*given})
    if unknown:
        raise UsageError(f"no directions of {printable(unknown[0])} were given, so none of them can be chosen.")
    edits: dict[str, Callable[[Tensor], LowRank]] = {}
    for name, directions in given.items():
        if chosen is None or name in chosen:
            ranks = list(range(len(directions.strength)) if chosen is None else chosen[name])
            edits[name] = partial(_added, _taken_away(tuned, directions, ranks))
    if not edits:
        raise UsageError("no direction is to be taken away: the weights would be copied as they are.")
    return edits


def orthogonalisation(tuned: Checkpoint, directions: Float[Tensor, "k d_model"]) -> Edits:
    """Take the span of `directions` out of everything that writes to the residual stream.

    Block outputs h then have h·r = 0 up to rounding in the stored dtype. Where one matrix is embedding and unembedding,
    the unembedding no longer reads r either; that is all in which the result differs from ablating r at every write.

    Args:
        tuned: a folder of full weights.
        directions: directions in the residual stream, of any length but 0.

    Raises:
        UsageError: the directions are of another width, all zero, or no numbers.
        NotTestable: a tensor whose part in the residual stream is not known (such a model could write r in a way that is
            not seen here), experts in one tensor, an adapter, or quantised weights.
    """
    plain_weights(tuned)
    lengths = directions.float().norm(dim=-1)
    if not len(lengths) or not bool((lengths > 0).all() and lengths.isfinite().all()):
        raise UsageError("a direction to take out is all zero or holds NaN or infinity.")
    units = directions.float() / lengths[:, None]
    basis = orthonormal(units)
    edits: dict[str, Callable[[Tensor], LowRank]] = {}
    for name in tuned.names():
        what = _part(name, tuned.model_type)
        if what == "unknown":
            raise NotTestable(
                f"whether {printable(name)} writes to the residual stream is not known (model type "
                f"{printable(tuned.model_type, 40)}), so this model cannot be orthogonalised for certain.\n"
                "Steer it at run time instead, or take singular directions out of the matrices that hold them."
            )
        if what == "writes" or what == "writes columns":
            rows_write = what == "writes"
            spanned = _before_norm(tuned, name, units) if tuned.model_type in POST_NORMS and rows_write else basis
            _same_width(tuned, name, 0 if rows_write else 1, spanned.shape[1])
            edits[name] = partial(_projected_rows if rows_write else _projected_columns, spanned)
    embeddings = [name for name in edits if _EMBEDDING.fullmatch(name)]
    if not embeddings:
        raise NotTestable("the weights hold no embedding by a name that is known, so what it writes cannot be edited.")
    return edits | {head: edits[embeddings[0]] for head in _tied_heads(tuned, embeddings)}


def plain_weights(tuned: Checkpoint) -> None:
    """Raises NotTestable when `tuned` is an adapter or quantised: its stored numbers are not its weights."""
    if tuned.kind != "model":
        raise NotTestable(
            "an adapter holds no weights that could be edited.\n"
            "Merge it into its base with PEFT's merge_and_unload, and edit the merged folder."
        )
    if tuned.quantisation is not None:
        raise NotTestable(
            "these weights are quantised: an edit would have to be rounded to the same grid, and may vanish in it.\n"
            "Edit the model that was quantised, and quantise the result."
        )


def _taken_away(tuned: Checkpoint, directions: Directions, ranks: Sequence[int]) -> LowRank:
    name, there = directions.name, len(directions.strength)
    if name not in tuned.names():
        raise UsageError(f"the model has no {printable(name)}, so nothing can be taken out of it.")
    if not ranks or not all(0 <= rank < there for rank in ranks) or len({*ranks}) < len(ranks):
        raise UsageError(
            f"{printable(name)} has {there} directions, from 0 to {there - 1}; asked for {list(ranks)}."
            if there
            else f"{printable(name)} has no direction above rounding noise to take away."
        )
    at = torch.tensor(ranks)
    write, read, strength = directions.write[at], directions.read[at], directions.strength[at]
    if not bool(strength.isfinite().all() and (strength > 0).all() and (write.norm(dim=-1) > 0).all()):
        raise UsageError(f"a direction of {printable(name)} is all zero or holds NaN or infinity.")
    role = module_role(name, tuned.model_type)
    left, right = (read, write) if role is not None and role.transposed else (write, read)
    if tuned.shape(name) != (left.shape[1], right.shape[1]):
        raise UsageError(
            f"{printable(name)} is {list(tuned.shape(name))} in this model; the directions are of a matrix of "
            f"{[left.shape[1], right.shape[1]]}."
        )
    return LowRank(-(strength[:, None] * left).mT.contiguous(), right)


def _added(fixed: LowRank, weight: Tensor) -> LowRank:
    """A change that does not depend on what is stored."""
    return fixed


def _projected_rows(basis: Float[Tensor, "rank d_model"], weight: Float[Tensor, "..."]) -> LowRank:
    """−Q QᵀW, for a matrix whose rows write and for a bias."""
    matrix = weight if weight.ndim == 2 else weight[:, None]
    read = torch.zeros(len(basis), matrix.shape[1])
    for share, rows in zip(basis.split(SLICE, dim=1), matrix.split(SLICE), strict=True):
        read += share @ rows.float()
    return LowRank(-basis.mT, read)


def _projected_columns(basis: Float[Tensor, "rank d_model"], weight: Float[Tensor, "rows d_model"]) -> LowRank:
    """−W Q Qᵀ, for an embedding and for a matrix stored [in out]."""
    return LowRank(torch.cat([-(rows.float() @ basis.mT) for rows in weight.split(SLICE)]), basis)


def _part(name: str, model_type: str) -> Literal["writes", "writes columns", "reads", "unknown"]:
    """What a tensor does to the residual stream, by its name."""
    role = module_role(name.removesuffix(".bias"), model_type)
    if role is not None:
        if not role.writes:
            return "reads"
        return "writes columns" if role.transposed and not name.endswith(".bias") else "writes"
    if _EMBEDDING.fullmatch(name):
        return "writes columns"
    found = _IN_BLOCK.fullmatch(name)
    if found is None:
        return "reads" if _READS.fullmatch(name) else "unknown"
    if found["module"] in (*ATTENTION, *MLP):
        return "unknown" if _LIKE_A_WRITER.search(found["rest"]) else "reads"
    after = _AFTER.values() if model_type in POST_NORMS else ()
    return "reads" if found["module"] in {*_BEFORE, *after} else "unknown"


def _before_norm(tuned: Checkpoint, name: str, units: Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    """Where a norm follows: g ⊙ x has nothing along r exactly where x has nothing along g ⊙ r."""
    role, found = module_role(name.removesuffix(".bias"), tuned.model_type), _IN_BLOCK.fullmatch(name)
    assert role is not None and found is not None, "only a writer in a block is asked about"
    norm = f"{found['block']}.{_AFTER[role.part]}.weight"
    if norm not in tuned.names():
        raise NotTestable(f"{printable(name)} should be followed by {printable(norm)}, which the weights do not hold.")
    gain = tuned.tensor(norm).float() + POST_NORMS[tuned.model_type]
    if gain.shape != units.shape[1:]:
        raise UsageError(f"{printable(norm)} has {len(gain)} values; the directions have {units.shape[1]}.")
    seen = gain * units
    return orthonormal(seen) if bool(seen.any()) else seen[:0]


def _same_width(tuned: Checkpoint, name: str, dim: int, wanted: int) -> None:
    shape = tuned.shape(name)
    if len(shape) != (1 if name.endswith(".bias") else 2):
        raise NotTestable(
            f"{printable(name)} is {list(shape)}: experts in one tensor are not edited.\nSteer the model at run time."
        )
    if shape[dim] != wanted:
        raise UsageError(
            f"the directions have {wanted} values; {printable(name)} writes {shape[dim]}.\n"
            "Take directions of this model, or carry them over with a map."
        )


def _tied_heads(tuned: Checkpoint, embeddings: Sequence[str]) -> list[str]:
    """Unembeddings stored beside an embedding that they are tied to: loaders differ in which of the two they read."""
    if tuned.config.get("tie_word_embeddings") is False:
        return []
    heads = [name for name in tuned.names() if _HEAD.fullmatch(name)]
    return [
        head
        for head in heads
        if any(
            tuned.shape(head) == tuned.shape(one) and torch.equal(tuned.tensor(head), tuned.tensor(one))
            for one in embeddings
        )
    ]
