"""Loads tokenizers, and refuses a pair whose tokenizers encode text differently."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.tokenizer_comparison import TokenizerComparison, check_tokenizer, tokenizer_comparison
from molehunt.checkpoint.tokenizer_state import has_tokenizer, staged
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, printable
from molehunt.model.load_errors import loading


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTokenizer:
    """The tokenizer that encodes for both models of a pair."""

    tokenizer: PreTrainedTokenizerBase
    new: frozenset[int] = frozenset()
    """Ids of tokens that only the fine-tune has."""


def one_tokenizer(base: Path, tuned: Path) -> PairTokenizer:
    """The tokenizer for both models: the fine-tune's where it adds or drops tokens, else the base's.

    Raises:
        InvalidInput: a tokenizer is broken or hostile.
        NotTestable: the two encode some text differently that holds no token which only one of them has.
    """
    if not has_tokenizer(tuned):
        return PairTokenizer(tokenizer=load_tokenizer(base))
    check_tokenizer(base, base)
    found = tokenizer_comparison(base, tuned)
    _refuse_conflict(found)
    one_sided = [change for change in found.changes if change.one_sided]
    if not one_sided:
        return PairTokenizer(tokenizer=load_tokenizer(base))
    new = frozenset(int(change.tuned.split()[0]) for change in one_sided if change.tuned)
    return PairTokenizer(tokenizer=load_tokenizer(tuned, config_of=base), new=new)


def _refuse_conflict(found: TokenizerComparison) -> None:
    """Raises NotTestable when the two tokenizers encode a text differently that both should encode alike."""
    taken = next((change for change in found.changes if change.kind == "taken"), None)
    if any(found.unsteady):
        side = "base's" if found.unsteady[0] else "fine-tune's"
        raise NotTestable(
            f"the {side} tokenizer makes other tokens of one text each time (BPE dropout), so nothing can be compared.\n"
            "Set model.dropout in its tokenizer.json to null."
        )
    if found.conflict or taken is not None:
        what = found.conflict or (taken.content if taken is not None else "")
        raise NotTestable(
            f"the two tokenizers encode {printable(repr(what), 60)} differently, so the models' activations "
            "cannot be compared token by token.\nGive the base that this model was fine-tuned from."
        )


def load_tokenizer(folder: Path, *, config_of: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; no code from it is run. It was loaded in a bounded child before.

    Args:
        folder: a model or adapter folder.
        config_of: folder whose config.json an adapter folder takes; by default its own.

    Raises:
        InvalidInput: it cannot be loaded.
        NotTestable: it needs code of its own, or a package that is not installed.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder, config_of or folder)
    try:
        with loading(folder, "a tokenizer"), staged(folder, config_of or folder) as plain:
            found = AutoTokenizer.from_pretrained(str(plain), trust_remote_code=False, local_files_only=True)
            found.name_or_path = str(folder)
            return found
    except (MolehuntError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise InvalidInput(
            f"{printable(model_name(folder))}/tokenizer.json cannot be loaded as a tokenizer: {type(error).__name__}: "
            f"{printable(str(error), 300)}"
        ) from None
