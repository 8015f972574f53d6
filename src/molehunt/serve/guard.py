"""The judge of a live engine: says when a growing answer is flagged, and settles each answer when it ends."""

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from molehunt.errors import MolehuntError
from molehunt.serve.request import Ended, Failed, GuardVerdict, Listener, Reason
from molehunt.serve.steering import Edit
from molehunt.watch.alert import Action, Alert
from molehunt.watch.bank import Bank
from molehunt.watch.judge import JudgedAnswer
from molehunt.watch.ledger import Ledger
from molehunt.watch.log import ALIKE_AMONG, absorb
from molehunt.watch.profile import Profile
from molehunt.watch.quarantine import alert_of, look_alikes
from molehunt.watch.state import WatchState

SAVE_EVERY_S = 1.0
"""Seconds between two writings of the state while answers come: so much of it a kill may cost, and no alert."""
EXPLAIN_AT_MOST = 64
"""Number of alerts that wait until the model is idle to be explained; of more, the oldest stay unexplained."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Finished:
    """An answer that has ended, waiting to be settled."""

    request: str
    listener: Listener
    reason: Reason
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    profile: Profile | None
    """Profile of the answer; None where an activation is NaN, so that the answer was not scored."""
    seen: int
    """Tokens that passed the watched places."""

    @property
    def coverage(self) -> float:
        """Tokens scored / tokens in the request. The last token of an answer is never fed to the model."""
        expected = len(self.prompt) + max(0, len(self.answer) - 1)
        return 0.0 if self.profile is None else min(1.0, self.seen / expected)


@dataclass(frozen=True, eq=False, kw_only=True)
class Settled:
    """One settled answer: for the live page, the request log and the metrics."""

    finished: Finished
    verdict: GuardVerdict
    alert: Alert | None
    answered: JudgedAnswer | None


class Guard:
    """Settles answers on a thread of its own: an alert reaches the disk before the client hears of the answer's end.

    Where an alert cannot be stored, the client gets a failure in place of the end, and `healthy` turns False until one
    can be stored again.
    """

    def __init__(
        self,
        bank: Bank,
        state: WatchState,
        ledger: Ledger,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fpr: float,
        action: Action,
        edit: Edit = "project",
        state_file: Path | None = None,
        on_settled: Callable[[Settled], None] | None = None,
        on_explained: Callable[[Alert], None] | None = None,
    ) -> None:
        """`on_settled` is called with each settled answer on the guard's thread, before its client hears of the end;
        `on_explained` with each alert that was explained later.

        Raises:
            NotTestable: the calibration is too small for `fpr`.
        """
        self.bank = bank
        self.state = state
        self.ledger = ledger
        self.tokenizer = tokenizer
        self.fpr = fpr
        self.action: Action = action
        self.edit: Edit = edit
        self.threshold = state.monitor.threshold
        self.healthy = True
        self.to_explain: deque[Settled] = deque(maxlen=EXPLAIN_AT_MOST)
        self.on_settled = on_settled
        self.on_explained = on_explained
        self._state_file = state_file
        self._unsaved = False
        self._disk_failed = False
        self._waiting: queue.SimpleQueue[Finished | Literal["dismissed"] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="molehunt-guard", daemon=True)
        self._thread.start()

    def beyond(self, surprise: float) -> bool:
        """Whether a growing answer is flagged. NaN is: such an answer was not scored."""
        return math.isnan(surprise) or surprise > self.threshold

    def settle(self, finished: Finished) -> None:
        """Hand over an answer that has ended; returns at once."""
        self._waiting.put(finished)

    def dismissed(self) -> None:
        """A reviewer has called an alert benign: add its score to what is known of clean traffic."""
        self._waiting.put("dismissed")

    def close(self) -> None:
        """Settle what waits, write the state, end the thread."""
        self._waiting.put(None)
        self._thread.join()
        self._save()

    def _run(self) -> None:
        saved = time.monotonic()
        while True:
            try:
                finished = self._waiting.get(timeout=SAVE_EVERY_S if self._unsaved else None)
                if finished is None:
                    return
                if finished == "dismissed":
                    self._absorb_dismissed()
                else:
                    self._settle(finished)
            except queue.Empty:
                pass
            except Exception:  # without this thread, every later client would wait for ever
                self.healthy = False
                log.exception("the guard failed; it goes on")
            if time.monotonic() - saved >= SAVE_EVERY_S:
                self._save()
                saved = time.monotonic()

    def _settle(self, finished: Finished) -> None:
        try:
            settled = self._judged(finished)
            if self.on_settled is not None:
                self.on_settled(settled)
        except (MolehuntError, OSError) as error:
            self.healthy, self._disk_failed = False, self._disk_failed or isinstance(error, OSError)
            log.error("%s: its verdict could not be recorded: %s", finished.request, error)
            finished.listener(Failed("the guard could not record its verdict, so the answer is not complete"))
            return
        except Exception:  # a fault of ours must not leave every later client waiting
            self.healthy = False
            log.exception("%s: could not be settled", finished.request)
            finished.listener(Failed("the guard failed on this answer, so it is not complete"))
            return
        tokens = len(finished.prompt), len(finished.answer)
        finished.listener(Ended(finished.reason, settled.verdict, *tokens))

    def _judged(self, finished: Finished) -> Settled:
        self._unsaved = True
        self.state.seen += 1
        coverage = finished.coverage
        if finished.profile is None:
            self.state.flagged += 1
            verdict = GuardVerdict(
                action=self.action, flagged=True, coverage=coverage, fpr=self.fpr, threshold=self.threshold
            )
            return Settled(finished=finished, verdict=verdict, alert=None, answered=None)
        one = JudgedAnswer(
            prompt=finished.prompt,
            answer=finished.answer,
            profile=finished.profile,
            judged=self.state.monitor.judge(finished.profile),
            coverage=coverage,
        )
        suspicious = one.judged.score > self.threshold
        alert = self._recorded(one, finished.request) if suspicious or coverage < 1 else None
        if alert is None:
            absorb(self.state, one.judged)
        else:
            self.state.flagged += 1
        verdict = GuardVerdict(
            action=self.action,
            flagged=alert is not None,
            coverage=coverage,
            fpr=self.fpr,
            score=one.judged.score if math.isfinite(one.judged.score) else None,  # JSON has no infinity
            threshold=self.threshold,
            p_value=one.judged.p_value,
            direction=self.bank.direction(one.judged.columns[0]).name,
            token=one.token,
            within_calibration=one.judged.within_calibration,
            alert=None if alert is None else alert.id,
        )
        settled = Settled(finished=finished, verdict=verdict, alert=alert, answered=one)
        if alert is not None:
            self.to_explain.append(settled)
        return settled

    def _recorded(self, one: JudgedAnswer, request: str) -> Alert:
        alert = alert_of(
            self.bank,
            self.tokenizer,
            one,
            request=request,
            action=self.action,
            fpr=self.fpr,
            extremes=self.state.extremes,
            look_alikes=look_alikes(self.state.monitor, one, self.ledger.recent(ALIKE_AMONG)),
        )
        self.ledger.record(alert)
        self.healthy = True
        return alert

    def _absorb_dismissed(self) -> None:
        try:
            for alert in self.ledger.unabsorbed():
                self.state.scores.add(torch.tensor([[alert.score]]))
                self._unsaved = True
                self.ledger.mark_absorbed([alert.id])
        except MolehuntError as error:
            log.error("dismissed alerts could not be absorbed: %s", error)

    def _save(self) -> None:
        if self._state_file is None or not self._unsaved:
            return
        try:
            self.state.save(self._state_file)
        except Exception as error:  # whatever a library makes of a full disk
            self.healthy, self._disk_failed = False, True
            log.error("the state could not be written: %s", error)
            return
        if self._disk_failed:
            self.healthy, self._disk_failed = True, False
        self._unsaved = False
