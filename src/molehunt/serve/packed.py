"""Watch an engine that packs the tokens of many requests side by side, and check that every token was scored.

vLLM's blocks return (hidden, residual), two summands that only the next norm adds up, and may write into both later: the
sum is taken, and scored, where the block returns. A prompt may come in chunks, and a request that was preempted comes
again from its start. Nothing here imports vLLM: tests hold it to Hugging Face's numbers on a stand-in of such blocks.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molehunt.errors import CannotTap, NotTestable, printable
from molehunt.model.blocks import decoder_blocks, modules_named
from molehunt.serve.request import GuardVerdict
from molehunt.watch.bank import Bank
from molehunt.watch.monitor import Monitor
from molehunt.watch.profile import RunningProfile


class PackedColumns:
    """The columns of one step: every watched place must have been reached once, by every token."""

    def __init__(self, places: int) -> None:
        self._parts: list[list[Tensor]] = [[] for _ in range(places)]

    def clear(self) -> None:
        """Forget what an earlier step left."""
        for part in self._parts:
            part.clear()

    def put(self, place: int, values: Float[Tensor, "tokens k"]) -> None:
        self._parts[place].append(values)

    def take(self, tokens: int) -> Float[Tensor, "{tokens} columns"] | None:
        """Every column of a step of that many tokens, in the bank's order; rows behind them are padding.

        None: a place was reached not once but never or in parts, so that rows cannot be distinguished.
        """
        parts = [part[0] for part in self._parts if len(part) == 1 and len(part[0]) >= tokens]
        whole = len(parts) == len(self._parts)
        self.clear()
        return torch.cat([part[:tokens] for part in parts], dim=-1) if whole else None


@contextmanager
def packed_columns(model: nn.Module, bank: Bank) -> Generator[PackedColumns, None, None]:
    """Score every forward pass inside the block against the directions of `bank`, as `watch.columns.watched` does.

    Args:
        model: blocks that return (hidden, residual) or the sum, of packed tokens [tokens d_model].

    Raises:
        NotTestable: the model has no such matrix, or one that reads another width: it is split or another model's.
        CannotTap: its blocks cannot be found; or, in a forward pass, a block returns something else.
    """
    blocks = decoder_blocks(model)
    found = PackedColumns(len(bank.write) + len(bank.read))
    device = next(model.parameters()).device

    def cosines(place: int, rows: Tensor) -> Callable[..., None]:
        unit = rows.to(device).mT.contiguous()

        def score(module: nn.Module, args: Any, output: Any) -> None:
            acts = summed(output).float()
            found.put(place, acts @ unit / acts.norm(dim=-1, keepdim=True).clamp_min(1e-12))

        return score

    def coordinates(name: str, place: int, rows: Tensor) -> Callable[..., None]:
        turned = rows.to(device).mT.contiguous()

        def score(module: nn.Module, args: Any) -> None:
            if not args or args[0].ndim != 2 or args[0].shape[1] != len(turned):
                raise CannotTap(f"{printable(name)} does not read packed tokens of width {len(turned)} here.")
            found.put(place, args[0].float() @ turned)

        return score

    handles: list[Any] = []
    try:
        for place, (site, rows) in enumerate(bank.write.items()):
            if site.layer >= len(blocks):
                raise NotTestable(f"This model has no {site}: the directions are of another model.")
            handles.append(blocks[site.layer].register_forward_hook(cosines(place, rows)))
        for place, (name, rows) in enumerate(bank.read.items(), len(bank.write)):
            named = modules_named(model, name)
            if len(named) != 1:
                raise NotTestable(
                    f"This model has {len(named)} modules called {printable(name)}: the directions are of another model, "
                    "or the engine calls it by another name."
                )
            handles.append(named[0].register_forward_pre_hook(coordinates(name, place, rows)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def summed(output: Any) -> Float[Tensor, "tokens d_model"]:
    """The residual stream of packed tokens behind a block. Raises CannotTap for an output of another kind."""
    hidden, residual = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    if isinstance(hidden, Tensor) and hidden.ndim == 2:
        if residual is None:
            return hidden
        if isinstance(residual, Tensor) and residual.shape == hidden.shape:
            return hidden + residual
    raise CannotTap(
        f"a block returned {type(output).__name__}, neither packed tokens [tokens d_model] nor (hidden, residual)."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens of one request in one step."""

    request: str
    start: int
    """Position of the first in its request."""
    tokens: int


@dataclass(eq=False)
class _Request:
    """One request that runs."""

    prompt: int
    """Number of its tokens."""
    growing: RunningProfile
    fed: int = 0
    """Tokens that the model was given: positions 0 to here."""
    seen: int = 0
    """Number of those tokens that were scored."""
    next: int = 0
    """The first position that is still to be scored; those before it were, or are lost."""

    def score(self, start: int, columns: Float[Tensor, "tokens columns"]) -> None:
        again = min(len(columns), max(0, self.next - start))  # fed again after it was preempted
        first, fresh = start + again, columns[again:]
        self.seen += len(fresh)
        self.next = max(self.next, first + len(fresh))
        answer = fresh[max(0, self.prompt - 1 - first) :]
        if len(answer):
            self.growing.extend(answer[None])

    @property
    def coverage(self) -> float:
        return self.seen / max(self.fed, self.prompt)


@dataclass(frozen=True, kw_only=True)
class PackedVerdict:
    """The verdict of the monitor on one request."""

    request: str
    finished: bool
    """Whether the request has ended; else the verdict is on its tokens so far."""
    status: Literal["flagged", "not flagged", "unmonitored"]
    """`unmonitored`: a token of it was not scored. Then nothing is known about it, whatever the rest scored."""
    verdict: GuardVerdict

    def to_dict(self) -> dict[str, Any]:
        """The verdict ready for JSON."""
        return {
            "request": self.request,
            "finished": self.finished,
            "status": self.status,
            **{name: value for name, value in asdict(self.verdict).items() if name not in ("action", "alert")},
        }


class PackedWatch:
    """Judges requests by the chunks that an engine feeds.

    Args:
        features: function from a prompt's tokens to its features, as `watch.strata.prompt_features` makes them.
    """

    def __init__(
        self,
        bank: Bank,
        monitor: Monitor,
        *,
        fpr: float,
        features: Callable[[Sequence[int]], Float[Tensor, "1 features"]],
        device: torch.device,
    ) -> None:
        self._bank = bank
        self._monitor = monitor
        self._fpr = fpr
        self._features = features
        self._device = device
        self._requests: dict[str, _Request | None] = {}
        """None for a request that cannot be judged."""
        self._ended: list[PackedVerdict] = []

    def begin(self, request: str, prompt: Sequence[int] | None) -> None:
        """A request comes, or comes again after it was preempted.

        Args:
            prompt: its token ids; None where it has none or they are not known: it will be unmonitored.
        """
        if request not in self._requests:
            growing = RunningProfile(self._features(prompt), len(self._bank.names), self._device) if prompt else None
            self._requests[request] = _Request(len(prompt or ()), growing) if growing else None

    def step(self, chunks: Iterable[Chunk], columns: Float[Tensor, "tokens columns"] | None) -> None:
        """One forward pass.

        Args:
            chunks: in the order in which they were packed.
            columns: of their tokens; None: this step could not be scored.
        """
        at = 0
        for chunk in chunks:
            self.begin(chunk.request, None)  # one that was running before the watch began
            request = self._requests[chunk.request]
            if request is not None:
                request.fed = max(request.fed, chunk.start + chunk.tokens)
                if columns is not None:
                    request.score(chunk.start, columns[at : at + chunk.tokens])
            at += chunk.tokens

    def end(self, requests: Iterable[str]) -> None:
        """No more tokens of these will come. Those that are not known do nothing."""
        for request in requests:
            if request in self._requests:
                self._ended.append(self._judged(request, finished=True))
                del self._requests[request]

    def verdicts(self) -> list[PackedVerdict]:
        """Verdicts on every request that has ended since the last call, and on those that run, so far."""
        ended, self._ended = self._ended, []
        return ended + [self._judged(request, finished=False) for request in self._requests]

    def _judged(self, name: str, *, finished: bool) -> PackedVerdict:
        request = self._requests[name]
        coverage = 0.0 if request is None else request.coverage
        judged = token = None
        if request is not None and request.growing.tokens[0]:
            try:
                profile = request.growing.profile(0)
            except ValueError:  # NaN: such a token was not scored
                coverage = 0.0
            else:
                judged = self._monitor.judge(profile)
                token = int(profile.peaks[judged.columns[0]]) + request.prompt - 1
        covered = coverage == 1 and judged is not None
        beyond = judged is not None and judged.score > self._monitor.threshold
        return PackedVerdict(
            request=name,
            finished=finished,
            status=("flagged" if beyond else "not flagged") if covered else "unmonitored",
            verdict=GuardVerdict(
                action="log",
                flagged=beyond or not covered,
                coverage=coverage,
                fpr=self._fpr,
                score=judged.score if judged is not None and math.isfinite(judged.score) else None,
                threshold=self._monitor.threshold,
                p_value=None if judged is None else judged.p_value,
                direction=None if judged is None else self._bank.direction(judged.columns[0]).name,
                token=token,
                within_calibration=judged is not None and judged.within_calibration,
            ),
        )
