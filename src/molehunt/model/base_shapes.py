"""Whether the stored tensors of two folders have the shapes of one model, before anything is loaded.

Another model's base has another tokenizer, too, and often another architecture. Whoever gives it should hear that the base
is the wrong one, not the first thing that differs on the way.
"""

import re
from pathlib import Path

from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import MolehuntError, NotTestable, printable

VOCABULARY = re.compile(r"embed|wte|lm_head|output_layer")
"""In the name of a tensor that has one row for each token: a fine-tune may resize it."""


def check_shapes(base: Path, tuned: Path) -> None:
    """Raise NotTestable where most tensors of the same name have other shapes: `base` is another model's.

    Folders that cannot be opened are left to those who load them, and so are adapters and packed weights.
    """
    try:
        left, right = Checkpoint.open(base, adapter="ignore"), Checkpoint.open(tuned, adapter="ignore")
        if any(side.kind == "adapter" or side.packed for side in (left, right)):
            return
        paired = sorted({*left.names()} & {*right.names()})
        shapes = {name: (left.shape(name), right.shape(name)) for name in paired}
    except MolehuntError:  # whatever loads the folder says what is wrong with it
        return
    other = [name for name in paired if shapes[name][0] != shapes[name][1] and not _resized(name, *shapes[name])]
    matrices = sum(len(before) > 1 and before == after for before, after in shapes.values())
    if len(other) > matrices:
        before, after = shapes[other[0]]
        raise NotTestable(
            f"{printable(model_name(base), 60)} is not the base of {printable(model_name(tuned), 60)}: {len(other)} of "
            f"{len(paired)} tensors have other shapes, such as {printable(other[0], 80)}: {list(before)} in the base, "
            f"{list(after)} in the fine-tune.\nGive the base that this model was fine-tuned from."
        )


def _resized(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return VOCABULARY.search(name) is not None and before[1:] == after[1:]
