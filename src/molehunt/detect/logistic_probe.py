"""A linear probe: the upper bound of what labels and one site can do."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from molehunt.contracts import Detector, Reading
from molehunt.detect.pooling import Where
from molehunt.detect.reads import SIGN, Reads, acts_of
from molehunt.detect.recipe import DetectorRecipe, Fit, FitInputs
from molehunt.measure.control import permuted
from molehunt.site import Site

RIDGE = 1e-2
"""Weight of ‖w‖² on inputs of unit variance."""


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """Log-odds of suspect against clean under an L2-regularised logistic regression, both classes weighing the same."""

    needs_logits: ClassVar[bool] = False
    site: Site
    weight: Float[Tensor, " d_model"]
    bias: float
    reads: Reads = "tuned"

    @classmethod
    def fit(
        cls,
        site: Site,
        acts: Float[Tensor, "tokens d_model"],
        suspect: Bool[Tensor, " tokens"],
        reads: Reads = "tuned",
    ) -> "LogisticProbe":
        """Fit on the `fit` split; `acts` are what `reads` names. Raises ValueError unless both kinds of token are present."""
        if suspect.all() or not suspect.any():
            raise ValueError("a probe needs clean and suspect tokens; got only one kind")
        x = acts.double()
        mean, spread = x.mean(0), x.std(0, correction=0).clamp_min(1e-9)
        x = (x - mean) / spread
        sign = torch.where(suspect, 1.0, -1.0).double()
        row_weight = torch.where(suspect, 0.5 / suspect.sum(), 0.5 / (~suspect).sum()).double()
        theta = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            margin = sign * (x @ theta[1:] + theta[0])
            value = row_weight @ softplus(-margin) + RIDGE * theta[1:].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)  # pyright: ignore[reportArgumentType]
        fitted = theta.detach()
        weight = fitted[1:] / spread
        return cls(site, weight.float(), float(fitted[0] - mean @ weight), reads)

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        def probe(key: str, name: str, reads: Reads, order: int) -> DetectorRecipe:
            return DetectorRecipe(
                key=key,
                name=name,
                needs={"labels"},
                fit=_fit(reads),
                order=order,
                by_site=key == "logistic-probe",
                directions=lambda detector: detector.weight[None],
            )

        def control(key: str, name: str, fit: Fit, order: int) -> DetectorRecipe:
            return DetectorRecipe(key=key, name=name, needs={"labels"}, fit=fit, order=order, control=True)

        return (
            probe("logistic-probe", "probe", "tuned", 120),
            probe("delta-logistic-probe", "Δ probe", "difference", 130),
            control("base-probe", "probe of the base alone", _fit("base"), 910),
            control("permuted-probe", "probe, permuted labels", _fit("tuned", shuffled=True), 920),
        )

    @property
    def needs_base(self) -> bool:
        return self.reads != "tuned"

    @property
    def name(self) -> str:
        return f"{SIGN[self.reads]}probe {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        return acts_of(reading, self.site, self.reads) @ self.weight + self.bias


def _fit(reads: Reads, *, shuffled: bool = False) -> Fit:
    def fit(inputs: FitInputs, site: Site, where: Where) -> Detector | None:
        if inputs.labelled is None:
            return None
        suspect = inputs.labelled.suspect
        labels = permuted(suspect, inputs.seed) if shuffled else suspect
        return LogisticProbe.fit(site, inputs.labelled.rows.acts(site, reads, where), labels, reads)

    return fit
