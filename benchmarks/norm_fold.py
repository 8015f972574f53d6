"""Cosines of block outputs, read from the norm that the model itself applies to them next.

An RMSNorm gives y = g · h / √(mean(h²) + ε). So cos(h, u) = y · (u / g) / √d_model up to ε: k directions are k more rows
beside the projections that read y anyway, and no length of h is ever computed. They stay rows of their own here, in
fp32: the model's projections, quantised or adapted, are not touched, and its logits stay what they were, bit for bit.

How far what is read may lie from normalize(h) · u:

- ε shortens it by the factor √(m / (m + ε)), m = mean(h²): never away from 0, and by at most ε / 2m of itself. This
  matters where m is near ε, as after the first blocks of some models. (The factor is ‖y / g‖ / √d_model; computing it
  costs what the fold saves.)
- y is rounded to the model's dtype, normed and scaled: by Cauchy-Schwarz at most the dtype's machine epsilon, absolute.
  That is 8e-3 in bf16; on the seed models it was 2e-4 as a rule and 1e-3 at most, and 1e-6 in fp32. The plain way
  takes h as it is, so directions whose cosines are small are better read that way in bf16.

What is calibrated one way is scored the same way.
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from molehunt.errors import CannotTap, NotTestable, printable
from molehunt.model.blocks import decoder_blocks, final_norm
from molehunt.model.taps import live, observe_sites
from molehunt.site import Site

INPUT_NORM = ("input_layernorm", "ln_1")
"""Names of the norm that reads a block's input, before its attention."""
LARGE = 1e3
"""Root mean square of probes beside which no norm's ε counts."""


class _Waiting:
    """The output of one block, from the block to the norm that reads it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.output: Tensor | None = None
        self.cosines: Tensor | None = None

    def see(self, acts: Float[Tensor, "batch pos d_model"]) -> None:
        self.output = acts  # to know it again; its values are not read
        self.cosines = None  # what the pass before left is no answer to this one


class Fold:
    """Cosines of the last forward pass, by site."""

    def __init__(self, waiting: Mapping[Site, _Waiting]) -> None:
        self._waiting = waiting

    def __getitem__(self, site: Site) -> Float[Tensor, "batch pos k"]:
        """fp32. Raises KeyError for a site not asked for, CannotTap when no norm has read its block's last output."""
        if site not in self._waiting:
            raise KeyError(f"{site} was not asked for; asked for: {', '.join(map(str, self._waiting))}")
        cosines = self._waiting[site].cosines
        if cosines is None:
            raise CannotTap(
                f"no forward pass has reached the norm after {site}: the model does not call that norm as "
                "a module, or the pass was stopped before it.\nRead the block's output instead."
            )
        return cosines


@contextmanager
def fold_cosines(
    model: nn.Module, directions: Mapping[Site, Float[Tensor, "_ d_model"]], *, layers_path: str | None = None
) -> Generator[Fold, None, None]:
    """Read cos(h, u) of every token in every forward pass inside the block, keeping the last pass.

    An edit of one of the sites must be entered before, outside, and is then seen.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        directions: rows to compare each site's activations with, used at unit length.
        layers_path: see `decoder_blocks`.

    Raises:
        NotTestable: a site cannot be read this way, or directions are of another width. `unfoldable` asks beforehand.
        CannotTap: the model is compiled; or, in a forward pass, a norm read something other than its block's output.
    """
    norms, refused = _norms_after(model, directions, layers_path)
    if refused:
        reasons = "\n".join(f"{site}: {why}" for site, why in refused.items())
        raise NotTestable(f"{reasons}\nRead these block outputs themselves instead.")
    waiting = {site: _Waiting(site) for site in directions}
    with ExitStack() as stack:
        observers = {site: each.see for site, each in waiting.items()}
        stack.enter_context(observe_sites(model, observers, layers_path=layers_path))
        for site, (norm, scale) in norms.items():
            d_model = len(scale)
            if directions[site].shape[1] != d_model:
                raise NotTestable(
                    f"{site}: the directions have width {directions[site].shape[1]}, and the model {d_model}: they are "
                    "another model's."
                )
            units = normalize(directions[site].to(scale.device, torch.float32), dim=-1)
            read = _reading(waiting[site], units / scale / math.sqrt(d_model))
            handle = norm.register_forward_hook(live(read))
            stack.callback(handle.remove)
        yield Fold(waiting)


def unfoldable(model: nn.Module, sites: Iterable[Site], *, layers_path: str | None = None) -> dict[Site, str]:
    """Why the cosines of some of these sites cannot be read from the norm that comes next; empty when all can.

    Raises CannotTap when the model's blocks cannot be found.
    """
    return _norms_after(model, sites, layers_path)[1]


def _reading(waiting: _Waiting, rows: Float[Tensor, "k d_model"]) -> Callable[[nn.Module, Any, Any], None]:
    def read(module: nn.Module, args: Any, output: Any) -> None:
        if not args or args[0] is not waiting.output:
            raise CannotTap(
                f"what comes after {waiting.site} is not read by the norm that should read it: the model computes "
                "something in between, or an edit of this site was entered inside fold_cosines.\n"
                "Enter the edit first, or read the block's output instead."
            )
        waiting.output = None
        waiting.cosines = output.float() @ rows.mT

    return read


def _norms_after(
    model: nn.Module, sites: Iterable[Site], layers_path: str | None
) -> tuple[dict[Site, tuple[nn.Module, Tensor]], dict[Site, str]]:
    """The norm that reads each site and its g; and why there is none, for the other sites."""
    blocks = decoder_blocks(model, layers_path)
    norms: dict[Site, tuple[nn.Module, Tensor]] = {}
    refused: dict[Site, str] = {}
    for site in sites:
        try:
            norm = _norm_after(model, blocks, site)
            norms[site] = norm, _scale(norm)
        except NotTestable as why:
            refused[site] = str(why)
    return norms, refused


def _norm_after(model: nn.Module, blocks: nn.ModuleList, site: Site) -> nn.Module:
    """Raises NotTestable when no norm is known to read the site."""
    if site.stream != "resid":
        raise NotTestable("only what a block puts out (resid) is read by a norm that comes next.")
    if site.layer >= len(blocks):
        raise NotTestable(f"the model has {len(blocks)} blocks, L0 to L{len(blocks) - 1}.")
    if site.layer == len(blocks) - 1:
        return final_norm(model)
    children = dict(blocks[site.layer + 1].named_children())
    for name in INPUT_NORM:
        if name in children:
            return children[name]
    raise NotTestable(
        f"the next block has no norm on its input by a name that Molehunt knows ({', '.join(INPUT_NORM)}); it has "
        f"{printable(', '.join(children), 400)}."
    )


def _scale(norm: nn.Module) -> Float[Tensor, " d_model"]:
    """g, found out by trying, as some models store g and others g − 1. Raises NotTestable where it serves nothing."""
    weight = next(norm.parameters(), None)
    if weight is None:
        raise NotTestable(f"{type(norm).__name__} has no weights to tell the width of the activations by.")
    alone = deepcopy(norm).float()
    with torch.no_grad():  # forward, not the module: hooks on it are no business of a probe
        scale: Tensor = alone.forward(LARGE * torch.ones(1, 1, len(weight), device=weight.device))[0, 0]
        ramp = torch.linspace(1, 2, len(weight), device=weight.device)
        given: Tensor = alone.forward(LARGE * ramp[None, None])[0, 0]
    if not torch.allclose(given, scale * ramp / ramp.square().mean().sqrt(), rtol=1e-4, atol=0):
        raise NotTestable(
            f"{type(norm).__name__} does more than divide by the root mean square and multiply (it centres, or has a "
            "bias), so its output holds no cosine."
        )
    lost = int((scale.abs() < torch.finfo(weight.dtype).smallest_normal).sum())
    if lost:
        raise NotTestable(
            f"{type(norm).__name__} multiplies {lost} of {len(scale)} dimensions by 0, or by less than "
            f"{str(weight.dtype).removeprefix('torch.')} can carry: what h holds there is lost in its output."
        )
    return scale
