"""What `molehunt steer` takes for a fix: one of an audit, a vector with its options, or a map to the base."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

if TYPE_CHECKING:
    from torch import nn

    from molehunt.model.pair import ModelPair
    from molehunt.steer.fix import Fix
    from molehunt.steer.trial import Steered
    from molehunt.transfer.saved import FittedMap

FixFile: TypeAlias = Annotated[
    Path,
    typer.Argument(metavar="FIX", help="fix.safetensors of an audit, a vector, or a map of `transfer fit TUNED BASE`."),
]
Strength: TypeAlias = Annotated[
    float | None, typer.Option(help="Of a vector; -1 takes back what 1 brings.", show_default="-1")
]
Operator: TypeAlias = Annotated[Literal["add", "ablate"], typer.Option(help="What a vector does.")]
Scope: TypeAlias = Annotated[
    Literal["all", "prompt", "generation", "last"], typer.Option(help="Tokens that a vector acts on.")
]
When: TypeAlias = Annotated[
    Path | None, typer.Option(help="Condition of `steer gate`: prompts that a vector acts on.", show_default="all")
]


def steered_by(
    pair: "ModelPair",
    file: Path,
    model_hash: str,
    strength: float | None,
    operator: Literal["add", "ablate"],
    scope: Literal["all", "prompt", "generation", "last"],
    when: Path | None,
) -> "Steered":
    """A fix of any kind, as `try_fix` and `capability_cost` take it."""
    from molehunt.errors import UsageError, printable
    from molehunt.steer.prefill_gate import Condition
    from molehunt.steer.vector import SteeringVector

    if not file.is_file():
        raise UsageError(f"{printable(str(file))} is not a file; give fix.safetensors of an audit, a vector or a map.")
    whole = _whole(pair, file, model_hash)
    if whole is not None:
        if strength is not None or scope != "all" or when is not None or operator != "add":
            raise UsageError(
                "--strength, --operator, --scope and --when are for vectors; a fix acts as it was judged, and a map as it "
                "was fitted."
            )
        return whole
    vector = SteeringVector.load(file, model=model_hash)
    at = pair.layers_path
    if when is not None and scope != "all":
        raise UsageError("--when and --scope say opposite things: a condition opens for whole rows.")
    by = -1.0 if strength is None else strength
    if when is None:
        return lambda model: vector.applied(model, by, operator=operator, scope=scope, layers_path=at)
    condition = Condition.load(when)

    @contextmanager
    def gated(model: "nn.Module") -> Generator[None, None, None]:
        with (
            condition.gate(model, layers_path=at) as opens,
            vector.applied(model, by, operator=operator, gate=opens, layers_path=at),
        ):
            yield

    return gated


def _whole(pair: "ModelPair", file: Path, model_hash: str) -> "Steered | None":
    """A fix or a map, which act whole; None for another file."""
    from molehunt.errors import InvalidInput
    from molehunt.steer.fix import Fix
    from molehunt.transfer.saved import load_map

    try:
        return _fixed(pair, Fix.load(file), model_hash)
    except InvalidInput:
        pass
    try:
        map = load_map(file)
    except InvalidInput:
        return None
    return _switch(pair, file, map, model_hash)


def _fixed(pair: "ModelPair", fix: "Fix", model_hash: str) -> "Steered":
    fix.refuse(pair.n_layers, pair.d_model, model_hash)
    return lambda model: fix.applied(model, layers_path=pair.layers_path)


def _switch(pair: "ModelPair", file: Path, map: "FittedMap", model_hash: str) -> "Steered":
    from molehunt.steer.mapped import switched
    from molehunt.transfer.saved import End, load_map

    source = End(site=map.source, d_model=pair.d_model, checkpoint=model_hash)
    load_map(file, source=source, target=End(site=map.source, d_model=pair.d_model))  # one block, both ends
    return lambda model: switched(model, map, layers_path=pair.layers_path)
