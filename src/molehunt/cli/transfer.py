"""`molehunt transfer`: carry a steering vector from one model to another through a map between their activations."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from molehunt.cli.options import AsJson, Device, Seed
from molehunt.cli.output import show, show_json
from molehunt.run.catalog import names
from molehunt.transfer.catalog import CATALOG, GROUP

app = typer.Typer()

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
    map: Annotated[
        str, typer.Option("--map", help=f"How the map is fitted: {', '.join(names(CATALOG, GROUP))}.")
    ] = "ridge",
    from_layer: Annotated[
        int | None, typer.Option(min=0, help="0-based block of the source.", show_default="chosen by the grid")
    ] = None,
    to_layer: Annotated[
        int | None, typer.Option(min=0, help="0-based block of the target.", show_default="chosen by the grid")
    ] = None,
    confirm: Annotated[int, typer.Option(min=1, help="Number of pairs of the grid that are tried in the target.")] = 3,
    source_base: Annotated[
        str | None, typer.Option(help="Base of a source that is an adapter.", show_default=False)
    ] = None,
    target_base: Annotated[
        str | None, typer.Option(help="Base of a target that is an adapter.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=20, help="Greatest number of rows that are read.")] = 3000,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit maps between all pairs of blocks in one pass over text, and keep the one that serves the target best.

    The grid ranks pairs by held-out variance unexplained; of the best few, the one that keeps most of the target's loss is kept.
    """
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows.transfer import transfer

    found = transfer(
        source,
        target,
        texts=text,
        from_layer=from_layer,
        to_layer=to_layer,
        map=map,
        confirm=confirm,
        source_base=source_base,
        target_base=target_base,
        limit=limit,
        device=device,
        seed=seed,
        track=track_on_stderr,
    )
    file = found.save(out)
    if as_json:
        show_json(found.to_dict())
        return
    show(found.summary())
    say(f"\nmap: {file}")


@app.command("carry")
def carry(
    map: MapFolder,
    vector: Annotated[
        Path, typer.Argument(metavar="VECTOR", help="The source's vector, from `steer fit`.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="File for the target's vector.")],
    as_json: AsJson = False,
) -> None:
    """Make a steering vector of the target out of one of the source's.

    The map's constant plays no part, and the length is what the target's own activations give it: `steer try` it there.
    """
    from molehunt.cli.console import say
    from molehunt.workflows.transfer import carry

    found = carry(map, vector)
    found.save(out)
    (site,) = found.sites
    norm = float(found.vectors[site.layer].norm())
    if as_json:
        show_json({"file": str(out), "site": str(site), "norm": norm}, indent=None)
        return
    show(f"{found.facts.method}, at {site}: norm {norm:.3g}")
    say(f"vector: {out}")
