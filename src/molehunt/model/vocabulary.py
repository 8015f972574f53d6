"""Vocabularies of a base and its fine-tune that are not the same: tokens were added, or the matrices were padded.

Both models read the same token ids, so both get a row for every id that either of them or the tokenizer has. A row that a
model lacks is the mean of its own rows, in the embedding and in the head, as transformers' `resize_token_embeddings` makes
it, without its noise. The mean of all logits lies below the log of their mean, so a model gives such a token at most the
share that one token of its vocabulary has on average: what only the fine-tune can say stands out, and every score is finite.

Logits of both models are then made comparable:

- a row that no token of the tokenizer uses (padding of the matrix), and a padding token that only the fine-tune has, can
  be no text: they count as impossible in both models, so a padded copy scores as the model itself;
- a token that ends answers and that only the fine-tune has stands beside the base's own end of an answer: the base
  gives it the same probability.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable, printable
from molehunt.model.blocks import unwrapped
from molehunt.model.generate import before_stop, stop_ids

IMPOSSIBLE = -1e4
"""Logit of a token that counts as impossible: its probability is 0 in every data type, and no score becomes infinite."""
NAMED = 8
"""Number of new tokens that a note names."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which ids the two models do not share, and how their logits are compared."""

    size: int
    """Number of rows of both models."""
    impossible: tuple[int, ...] = ()
    """Ids that are no text."""
    ends: tuple[int, ...] = ()
    """Ids that end answers and that only the fine-tune has."""
    own_ends: tuple[int, ...] = ()
    """Ids that end answers of the base."""
    notes: tuple[str, ...] = ()
    """What the two do not share, in words."""

    def compare_(self, base: Tensor, tuned: Tensor) -> None:
        """Make the logits of both models comparable, in place."""
        if self.ends and self.own_ends:
            own = base[..., list(self.own_ends)].logsumexp(-1, keepdim=True)
            base[..., list(self.ends)] = own.expand(*own.shape[:-1], len(self.ends))
        if self.impossible:
            for logits in (base, tuned):
                logits[..., list(self.impossible)] = IMPOSSIBLE

    def without_end(self, answer: Sequence[int]) -> list[int]:
        """An answer up to an end that only the fine-tune has, where the two models' likelihoods are compared apart."""
        return before_stop(answer, self.ends)


def shared_vocabulary(
    base: nn.Module, tuned: nn.Module, tokenizer: PreTrainedTokenizerBase, new: Collection[int] = ()
) -> Vocabulary:
    """Give both models a row for every id, in place, and say what they do not share.

    Args:
        base: the base; it may be the fine-tune itself with its adapter switched off.
        tuned: the fine-tune.
        tokenizer: encodes for both.
        new: ids of tokens that only the fine-tune's tokenizer has.

    Raises:
        NotTestable: a model lacks rows, and its embedding cannot grow.
    """
    rows = embedding_rows(base), embedding_rows(tuned)
    tokens = tokenizer.get_vocab()
    used = 1 + max(tokens.values(), default=-1)
    size = max(*rows, used)
    for model, held in {id(model): (model, held) for model, held in zip((base, tuned), rows, strict=True)}.values():
        if held < size:
            grow_(model, size)
    if len({*rows, size}) == 1 and not new:
        return Vocabulary(size=size)
    foreign = {i for i in tokens.values() if i >= rows[0]} | set(new)
    _stop_at_own_end(tuned, tokenizer, foreign)
    pad, end = (cast("int | None", one) for one in (tokenizer.pad_token_id, tokenizer.eos_token_id))
    padding = {pad} if pad is not None and pad in foreign and pad != end else set[int]()
    nobody = set(range(min(rows), size)) - set(tokens.values())
    return Vocabulary(
        size=size,
        impossible=tuple(sorted(nobody | padding)),
        ends=tuple(sorted(stop_ids(tuned, tokenizer) & foreign)),
        own_ends=tuple(sorted(i for i in stop_ids(base, tokenizer) - foreign if i < rows[0])),
        notes=_notes(rows, used, {i: token for token, i in tokens.items() if i in foreign}),
    )


def embedding_rows(model: nn.Module) -> int:
    """Number of token ids that a model has an embedding for."""
    return int(cast("Any", unwrapped(model)).get_input_embeddings().weight.shape[0])


@torch.no_grad()
def grow_(model: nn.Module, size: int) -> None:
    """Give embedding and head of `model` rows up to `size`, each the mean of those that it has, in place.

    Raises NotTestable when the embedding cannot grow, such as one inside an adapter.
    """
    inner = cast("Any", unwrapped(model))
    held = embedding_rows(model)
    if isinstance(getattr(inner.get_input_embeddings(), "base_layer", None), nn.Module):
        raise NotTestable(
            f"the tokenizer has tokens up to id {size - 1}, and the adapted embedding has {held} rows.\n"
            "Merge the adapter into its base, and give the merged model."
        )
    means = [(layer.weight[:held].float().mean(0), _bias_mean(layer, held)) for layer in _tables(inner)]
    try:
        inner.resize_token_embeddings(size, mean_resizing=False)
    except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
        raise NotTestable(
            f"{type(inner).__name__} has {held} embeddings, and {size} are needed to compare the two models; it cannot grow: "
            f"{printable(str(error), 200)}"
        ) from error
    for layer, (weight, bias) in zip(_tables(inner), means, strict=True):
        layer.weight[held:] = weight.to(layer.weight)
        if bias is not None:
            layer.bias[held:] = bias.to(layer.bias)


def _tables(inner: Any) -> list[Any]:
    return [layer for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()) if layer is not None]


def _bias_mean(layer: Any, held: int) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias[:held].float().mean() if isinstance(bias, Tensor) else None


def _stop_at_own_end(tuned: nn.Module, tokenizer: PreTrainedTokenizerBase, foreign: Collection[int]) -> None:
    """End answers of the fine-tune at its tokenizer's new end token, too: an adapter has no generation settings of its own."""
    config = getattr(unwrapped(tuned), "generation_config", None)
    end = cast("int | None", tokenizer.eos_token_id)
    if config is not None and end is not None and end in foreign:
        config.eos_token_id = sorted({end, *stop_ids(tuned, tokenizer)})


def _notes(rows: tuple[int, int], used: int, foreign: dict[int, str]) -> tuple[str, ...]:
    notes: list[str] = []
    if foreign:
        named = ", ".join(printable(repr(foreign[i]), 40) for i in sorted(foreign)[:NAMED])
        more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
        some = "1 token is" if len(foreign) == 1 else f"{len(foreign)} tokens are"
        notes.append(
            f"{some} the fine-tune's alone ({named}{more}); the base was never trained on that, and where it has no row, the "
            "mean of its rows stands for it"
        )
    if rows[0] != rows[1]:
        notes.append(
            f"the vocabulary was resized: {rows[0]} rows in the base, {rows[1]} in the fine-tune, {used} ids in use; "
            "ids that no token uses are left out"
        )
    if used > rows[1]:
        notes.append(
            f"the fine-tune has {rows[1]} rows and its tokenizer {used} ids; the mean stands for those missing"
        )
    return tuple(notes)
