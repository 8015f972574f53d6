"""Where the weights changed: the layer map, the strongest directions with the tokens they stand for, and spectra."""

import torch

from molehunt.audit.result import Audit
from molehunt.direction.readout import lens_logits, token_readout
from molehunt.model.blocks import final_norm, unembedding
from molehunt.report import schema

CARDS = 8
"""Number of weight directions that the page reads out."""
READOUT = 8
"""Number of tokens that each direction promotes, and suppresses, on the page."""
SPECTRA = 12
"""Number of matrices whose singular values are listed."""
MODULES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
"""Matrices of a block, in the order of the map's rows."""


def heat(audit: Audit) -> schema.Heat | None:
    """The layer × module map; None where no matrix could be compared."""
    rows = [row for row in audit.weights.matrices if row.layer is not None and row.role is not None]
    if not rows:
        return None
    modules = [name for name in MODULES if any(row.role == name for row in rows)]
    return schema.Heat(
        layers=tuple(sorted({row.layer for row in rows if row.layer is not None})),
        modules=tuple(modules),
        cells=tuple(
            schema.HeatCell(
                layer=row.layer or 0, module=row.role or "", z=row.z, relative_norm=row.rel_norm, status=row.status
            )
            for row in rows
        ),
    )


def direction_cards(audit: Audit) -> tuple[schema.DirectionCard, ...]:
    """The strongest directions and the tokens that they promote and suppress."""
    strongest = sorted(audit.weights.all_directions(), key=lambda d: -(d.provenance.z or 0.0))[:CARDS]
    if not strongest:
        return ()
    with audit.pair.tuned_model() as model:
        logits = lens_logits(
            torch.stack([d.vector for d in strongest]).to(audit.pair.device),
            final_norm(model),
            unembedding(model).weight,  # pyright: ignore[reportArgumentType]
        )
    cards: list[schema.DirectionCard] = []
    for direction, row in zip(strongest, logits.cpu(), strict=True):
        read = token_readout(row, lambda i: str(audit.pair.tokenizer.decode([i])), k=READOUT)
        facts = direction.provenance
        cards.append(
            schema.DirectionCard(
                name=direction.name,
                site=str(direction.site),
                tensor=facts.tensor or "",
                strength=facts.strength,
                share=facts.share or 0.0,
                z=facts.z or 0.0,
                over_floor=facts.over_floor,
                promoted=tuple(t.token for t in read.promoted),
                suppressed=tuple(t.token for t in read.suppressed),
            )
        )
    return tuple(cards)


def spectra(audit: Audit) -> tuple[schema.Spectrum, ...]:
    """Singular values above the rounding noise, of the matrices with the strongest directions."""
    rows = sorted((r for r in audit.weights.matrices if r.strengths), key=lambda r: -(r.z or 0.0))[:SPECTRA]
    return tuple(schema.Spectrum(tensor=row.tensor, values=row.strengths) for row in rows)
