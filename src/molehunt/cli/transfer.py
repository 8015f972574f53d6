"""`molehunt transfer`: carry a steering vector from one model to another through a map between their activations."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import typer

from molehunt.cli.options import AsJson, Device, Seed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from molehunt.site import Site
    from molehunt.transfer.alignment import Aligned
    from molehunt.transfer.fidelity import Forced
    from molehunt.transfer.layer_grid import LayerGrid
    from molehunt.transfer.map_file import Models

app = typer.Typer()

MAP, MOMENTS, TOLD = "map.safetensors", "moments.safetensors", "transfer.json"
SHARES = (0.7, 0.85)
"""Texts up to the first share fit, from there to the second they choose, and the others judge."""

Source: TypeAlias = Annotated[
    str, typer.Argument(metavar="SOURCE", help="The model that has a vector: a folder or a hub id.", show_default=False)
]
Target: TypeAlias = Annotated[
    str, typer.Argument(metavar="TARGET", help="The model that is to get it: a folder or a hub id.", show_default=False)
]
MapFolder: TypeAlias = Annotated[
    Path, typer.Argument(metavar="MAP", help="Folder of `transfer fit`.", show_default=False)
]


@app.callback()
def transfer() -> None:
    """Carry a steering vector from one model to another, through a map between their activations."""


@app.command("fit")
def fit(
    source: Source,
    target: Target,
    out: Annotated[Path, typer.Option("--out", help="Folder for the map, its moments and the grid.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Rows that both models read: prompts, with answers where there are some.",
            show_default="bundled prompts",
        ),
    ] = None,
    from_layer: Annotated[
        int | None, typer.Option(min=0, help="0-based block of the source.", show_default="chosen by the grid")
    ] = None,
    to_layer: Annotated[
        int | None, typer.Option(min=0, help="0-based block of the target.", show_default="chosen by the grid")
    ] = None,
    confirm: Annotated[int, typer.Option(min=1, help="Pairs of the grid that are tried in the target.")] = 3,
    source_base: Annotated[
        str | None, typer.Option(help="Base of a source that is an adapter.", show_default=False)
    ] = None,
    target_base: Annotated[
        str | None, typer.Option(help="Base of a target that is an adapter.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=20, help="Rows to read at most.")] = 3000,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit maps between all pairs of blocks in one pass over text, and keep the one that serves the target best.

    The grid ranks pairs by held-out variance unexplained; the best few replace the target's own activations on other
    texts, and the one that keeps most of its loss is kept.
    """
    import json

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import UsageError
    from molehunt.model.blocks import decoder_blocks
    from molehunt.run.whole import write_whole
    from molehunt.site import Site
    from molehunt.transfer.collect import moments_of
    from molehunt.transfer.fidelity import teacher_forced
    from molehunt.transfer.layer_grid import LayerGrid, confirmed
    from molehunt.transfer.ridge import shuffled

    with _opened(source, source_base, device) as a, _opened(target, target_base, device) as b:
        rows = _aligned(a, b, text, limit, seed)
        some, chooses, judges = (rows[int(lo * len(rows)) : int(hi * len(rows))] for lo, hi in _spans())
        ends = [decoder_blocks(one.model) for one in (a, b)]
        for name, layer, blocks in (("--from-layer", from_layer, ends[0]), ("--to-layer", to_layer, ends[1])):
            if layer is not None and layer >= len(blocks):
                raise UsageError(f"{name} {layer}: that model has blocks 0 to {len(blocks) - 1}.")
        chosen = [
            [Site(one) for one in (range(len(blocks)) if layer is None else [layer])]
            for layer, blocks in ((from_layer, ends[0]), (to_layer, ends[1]))
        ]
        models = _models(a, b)

        def read(part: "Sequence[Aligned]") -> Any:
            return moments_of(
                a.model, b.model, part, sources=chosen[0], targets=chosen[1], models=models, track=track_on_stderr
            )

        of_fit, held_out = read(some), read(chooses)
        grid = LayerGrid.of(of_fit, held_out)
        # other texts than those that ranked the pairs choose among the best; a third part judges
        half = len(judges) // 2
        found = confirmed(a.model, b.model, judges[:half], grid.best(confirm), of_fit, held_out, track=track_on_stderr)[
            0
        ]
        pair = found.pair.source, found.pair.target
        maps = {"map": found.map, "shuffled": shuffled(of_fit.pair(*pair), held_out.pair(*pair))}
        judged = teacher_forced(a.model, b.model, judges[half:], maps, track=track_on_stderr)
    out.mkdir(parents=True, exist_ok=True)
    found.map.save(out / MAP)
    of_fit.save(out / MOMENTS)
    told = {
        "source": str(pair[0]),
        "target": str(pair[1]),
        "target_layers": len(ends[1]),
        "method": found.map.facts.method,
        "tokens": of_fit.count,
        "coverage": sum(len(row.pairs) for row in rows) / sum(len(row.target) for row in rows),
        "fvu": found.pair.fvu,
        "grid": [
            {**one._asdict(), "source": str(one.source), "target": str(one.target)} for one in map(_Cell.of, grid.pairs)
        ],
        "fidelity": {name: _forced(one) for name, one in judged.items()},
    }
    write_whole(out / TOLD, json.dumps(told, indent=2))
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(_grid_text(grid))
    typer.echo(
        f"\n{pair[0]} to {pair[1]}: {found.map.facts.method}, {of_fit.count:,} aligned tokens ({told['coverage']:.0%} of the "
        f"target's), held-out FVU {found.pair.fvu:.3f}"
    )
    typer.echo(
        f"\n{'on other texts, in the target':<32}{'KL, nats a token':>24}{'CE recovered':>24}{'same next token':>24}"
    )
    for name, one in judged.items():
        cells = (one.kl_per_token(), one.ce_recovered(), one.agreement())
        typer.echo(f"{name:<32}" + "".join(f"{_share(cell):>24}" for cell in cells))
    say(f"\nmap: {out / MAP}")


@app.command("carry")
def carry(
    map: MapFolder,
    vector: Annotated[
        Path, typer.Argument(metavar="VECTOR", help="The source's, from `steer fit`.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="File for the target's vector.")],
    as_json: AsJson = False,
) -> None:
    """Make a steering vector of the target out of one of the source's.

    The map's constant plays no part, and the length is what the target's own activations give it: `steer try` it there.
    """
    import json

    from molehunt.cli.console import say
    from molehunt.errors import InvalidInput, printable
    from molehunt.steer.vector import SteeringVector
    from molehunt.transfer.linear_map import LinearMap
    from molehunt.transfer.mapped_vector import mapped_vector
    from molehunt.transfer.statistics import GridMoments

    through = LinearMap.load(map / MAP)
    try:
        n_layers = int(json.loads((map / TOLD).read_text(encoding="utf-8"))["target_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{printable(str(map / TOLD))} cannot be read: {printable(str(error))}") from None
    fit = GridMoments.load(map / MOMENTS).pair(through.source, through.target)
    found = mapped_vector(SteeringVector.load(vector), through, fit, n_layers=n_layers)
    found.save(out)
    norm = float(found.vectors[through.target.layer].norm())
    if as_json:
        typer.echo(json.dumps({"file": str(out), "site": str(through.target), "norm": norm}))
        return
    typer.echo(f"{through.source} to {through.target}: norm {norm:.3g}")
    say(f"vector: {out}")


class _Opened(NamedTuple):
    model: "nn.Module"
    tokenizer: "PreTrainedTokenizerBase"
    checkpoint: str


class _Cell(NamedTuple):
    source: "Site"
    target: "Site"
    fvu: float
    cka: float
    svcca: float

    @classmethod
    def of(cls, pair: Any) -> "_Cell":
        return cls(pair.source, pair.target, pair.fvu, pair.cka, pair.svcca)


@contextmanager
def _opened(path: str, base: str | None, device: str) -> Generator[_Opened, None, None]:
    import torch

    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.cli.console import track_on_stderr
    from molehunt.cli.tuned_side import open_pair
    from molehunt.errors import UsageError, printable
    from molehunt.model.loading import ADAPTER_CONFIG, device_of, load_model, load_tokenizer, local_folder
    from molehunt.run.progress import busy

    folder = local_folder(path)
    checkpoint = Checkpoint.open(folder, adapter="refuse" if base is None else "use").content_hash()
    if base is not None:
        pair = open_pair(base, path, True, device)
        with pair.tuned_model() as model:
            yield _Opened(model, pair.tokenizer, checkpoint)
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{printable(folder.name)} is an adapter: say what it is applied to with --source-base or --target-base."
        )
    where = device_of(device)
    with busy(track_on_stderr, f"loading {printable(folder.name)}"):
        model = load_model(folder, where, torch.float32 if where.type == "cpu" else None)
    yield _Opened(model, load_tokenizer(folder), checkpoint)


def _spans() -> tuple[tuple[float, float], ...]:
    return (0.0, SHARES[0]), SHARES, (SHARES[1], 1.0)


def _aligned(a: _Opened, b: _Opened, text: Path | None, limit: int, seed: int) -> "list[Aligned]":
    """Texts as both models read them, in the target's chat format, shuffled."""
    from molehunt.errors import NotTestable
    from molehunt.traffic.benign import benign_prompts
    from molehunt.traffic.chat import prompt_text
    from molehunt.traffic.stream import read_traffic
    from molehunt.transfer.alignment import align

    rows = list(read_traffic(text, limit)) if text else benign_prompts(limit, seed=seed)
    if len(rows) < 20:
        raise NotTestable(f"{len(rows)} texts are too few to fit, choose and judge a map on; give at least 20.")
    rows = Random(seed).sample(rows, len(rows))
    whole = [prompt_text(b.tokenizer, row.prompt) + (row.response or "") for row in rows]
    return [align(a.tokenizer, b.tokenizer, one) for one in whole]


def _models(a: _Opened, b: _Opened) -> "Models":
    from molehunt.activation.identity import tokenizer_hash
    from molehunt.transfer.map_file import Models

    return Models(
        source=a.checkpoint,
        target=b.checkpoint,
        source_tokenizer=tokenizer_hash(a.tokenizer),
        target_tokenizer=tokenizer_hash(b.tokenizer),
    )


def _grid_text(grid: "LayerGrid") -> str:
    """Held-out FVU of every pair."""
    targets = sorted({pair.target for pair in grid.pairs})
    fvu = {(pair.source, pair.target): pair.fvu for pair in grid.pairs}
    lines = ["held-out FVU by pair of blocks: source down, target across"]
    lines.append(f"{'':<10}" + "".join(f"{site!s:>10}" for site in targets))
    for source in sorted({pair.source for pair in grid.pairs}):
        lines.append(f"{source!s:<10}" + "".join(f"{fvu[source, target]:>10.3f}" for target in targets))
    return "\n".join(lines)


def _forced(one: "Forced") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "kl": asdict(one.kl_per_token()),
        "ce_recovered": asdict(one.ce_recovered()),
        "top1": asdict(one.agreement()),
    }


def _share(found: Any) -> str:
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
