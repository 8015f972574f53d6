"""What goes wrong for one answer stays with that answer: the guard goes on, and says that it is not healthy."""

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guarded import PROMPTS, generation, guard_of, run
from molehunt.model.pair import ModelPair
from molehunt.model.sampling import Sampler, Sampling, next_tokens
from molehunt.serve import guard as guard_module
from molehunt.serve.guard import Guard, Settled
from molehunt.serve.request import Ended, Failed
from molehunt.watch.bank import Bank
from molehunt.watch.ledger import Ledger
from molehunt.watch.state import WatchState


@given(st.sampled_from([5e-324, 1e-320, 1e-300, 1e-30, 1e-9]), st.sampled_from([1.0, 0.9, 1e-9]), st.integers(0, 99))
def test_a_temperature_near_zero_is_greedy(temperature: float, top_p: float, seed: int) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 30
    samplers = [Sampler(Sampling(temperature=temperature, top_p=top_p, seed=seed)) for _ in range(3)]
    assert next_tokens(logits, samplers) == logits.argmax(-1).tolist()


def test_a_temperature_of_one_still_draws() -> None:
    logits = torch.tensor([0.0, 0.5, 1.0, -200.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    drawn = torch.tensor([sampler.draw(logits) for _ in range(3000)]).bincount(minlength=4) / 3000
    assert (drawn - logits.softmax(0)).abs().max() < 0.03 and drawn[3] == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a fault of ours")])
def test_an_answer_that_cannot_be_reported_fails_and_others_do_not(
    error: Exception, pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger)
    seen: list[Settled] = []

    def report(one: Settled) -> None:
        seen.append(one)
        if len(seen) == 2:
            raise error

    guard.on_settled = report
    heard = run(pair, guard, [generation(PROMPTS[0]), generation(PROMPTS[1])])
    ends = [one.last for one in heard]
    assert len(seen) == 2 and not guard.healthy
    assert sum(isinstance(end, Failed) for end in ends) == 1 and sum(isinstance(end, Ended) for end in ends) == 1


def test_a_state_that_cannot_be_saved_ends_no_thread_and_health_comes_back(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(guard_module, "SAVE_EVERY_S", 0.02)
    full = [True]

    def save(path: Path) -> None:
        if full[0]:
            raise ValueError("I/O error: No space left on device (os error 28)")
        path.write_bytes(b"saved")

    made = guard_of(pair, bank, calibrated_state, ledger)
    monkeypatch.setattr(type(made.state), "save", lambda self, path: save(path))
    guard = Guard(
        bank, made.state, ledger, pair.tokenizer, fpr=made.fpr, action="flag", state_file=tmp_path / "state.safetensors"
    )
    made.close()
    guard._unsaved = True
    guard.dismissed()
    _until(lambda: not guard.healthy)
    assert guard._thread.is_alive()
    full[0] = False
    _until(lambda: guard.healthy)
    guard.close()
    assert (tmp_path / "state.safetensors").read_bytes() == b"saved"


def _until(true: object) -> None:
    assert callable(true)
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about within 5 s")
