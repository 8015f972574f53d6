"""Where to steer: the shift from rows without a behaviour to rows with it, block by block."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.direction.mean_difference import mean_difference
from molehunt.direction.pca import pca_directions
from molehunt.errors import UsageError
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.patch import prompt_acts
from molehunt.traffic.chat import Text

Method = Literal["difference in means", "pca", "logistic probe"]


def last_token_acts(
    pair: ModelPair, prompts: Sequence[Text], sites: Sequence[Site], *, track: Track = silent
) -> dict[Site, Float[Tensor, "prompts d_model"]]:
    """Activations of the tuned model at each prompt's last token, where the first token of its answer is decided.

    Raises:
        CannotTap: the model lacks such a site (see `read_sites`).
    """
    rows = pair.tokenize(prompts)
    with pair.tuned_model() as model:
        read = prompt_acts(
            model, rows, [[len(row) - 1] for row in rows], sites, layers_path=pair.layers_path, track=track
        )
    return {site: torch.cat([one[site] for one in read]) for site in sites}


def contrast_shifts(
    positive: Mapping[Site, Float[Tensor, "n d_model"]],
    negative: Mapping[Site, Float[Tensor, "m d_model"]],
    method: Method = "difference in means",
) -> dict[int, Float[Tensor, " d_model"]]:
    """The shift from rows without a behaviour to rows with it, at every block that both sides have.

    Every method's direction gets the length of the part of the shift of means that lies along it, so that strengths
    compare between methods.

    - `difference in means`: the shift itself; with as many paired rows this is CAA (arXiv 2312.06681).
    - `pca`: the first principal direction of the paired differences, about 0 (arXiv 2310.01405).
    - `logistic probe`: the normal of an L2-regularised logistic regression.

    Args:
        positive: activations of rows with the behaviour, by block output.
        negative: activations of rows without it; `pca` pairs them with the positive ones, row by row.
        method: one of the three.

    Raises:
        NotTestable: fewer than two rows of a side, or no difference (see `direction.mean_difference`).
        UsageError: unequal numbers of rows for `pca`.
    """
    shifts: dict[int, Tensor] = {}
    for site in sorted({*positive} & {*negative}):
        a, b = positive[site].float(), negative[site].float()
        direction = mean_difference(site, a, b)
        shift = direction.vector * direction.provenance.strength
        shifts[site.layer] = shift if method == "difference in means" else along(_unit(site, a, b, method), shift)
    return shifts


def along(unit: Float[Tensor, " d_model"], shift: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The part of a shift of means that lies along a unit vector: how every method's vector gets its length."""
    return (shift @ unit) * unit


def _unit(
    site: Site, a: Float[Tensor, "n d_model"], b: Float[Tensor, "m d_model"], method: Method
) -> Float[Tensor, " d_model"]:
    if method == "pca":
        if len(a) != len(b):
            raise UsageError(
                f"the method pca pairs the prompts of both sides row by row: give as many of each; got {len(a)} with the "
                f"behaviour and {len(b)} without it."
            )
        return pca_directions(site, torch.cat([a - b, b - a]), k=1)[0].vector  # both signs: about 0
    suspect = torch.arange(len(a) + len(b)) < len(a)
    weight = LogisticProbe.fit(site, torch.cat([a, b]), suspect).weight
    return weight / weight.norm()
