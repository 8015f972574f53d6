"""A guarded server of a tiny random model, on a real socket."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from guarded import FPR, clean_rows, guard_of, tiny_pair
from molehunt.model.pair import ModelPair
from molehunt.serve.app import Settings, create_app
from molehunt.serve.guard import Guard
from molehunt.serve.keys import LOOPBACK, Keys
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate
from molehunt.watch.ledger import Ledger
from molehunt.watch.state import WatchState
from watched_banks import bank_of

KEY = "a-key-for-tests-only"


@dataclass(frozen=True)
class Served:
    url: str
    guard: Guard
    ledger: Ledger
    pair: ModelPair

    def client(self, **settings: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60, **settings)  # pyright: ignore


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def pair() -> ModelPair:
    return tiny_pair()


@pytest.fixture(scope="session")
def bank() -> Bank:
    return bank_of("llama")


@pytest.fixture(scope="session")
def calibrated_state(pair: ModelPair, bank: Bank) -> WatchState:
    return calibrate(pair, bank, clean_rows(400), fpr=FPR, identity={}, max_new_tokens=8, seed=0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(f"sqlite:///{tmp_path / 'alerts.sqlite'}") as opened:
        yield opened


@pytest.fixture
def serve(pair: ModelPair, bank: Bank, calibrated_state: WatchState, tmp_path: Path) -> Iterator[Serve]:
    """Starts servers; all of them drain at the end of the test."""
    running: list[tuple[uvicorn.Server, threading.Thread, Ledger]] = []

    def start(*, action: str = "flag", threshold: float | None = None, **settings: object) -> Served:
        ledger = Ledger(f"sqlite:///{tmp_path / f'alerts{len(running)}.sqlite'}")
        guard = guard_of(pair, bank, calibrated_state, ledger, action=action, threshold=threshold)
        reported = {"model_name": "tiny", "hosts": frozenset(LOOPBACK), "default_new_tokens": 8, **settings}
        app = create_app(pair, guard, Keys(KEY), Settings(**reported))  # pyright: ignore[reportArgumentType]
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread, ledger))
        return Served(f"http://127.0.0.1:{sock.getsockname()[1]}", guard, ledger, pair)

    yield start
    for server, thread, ledger in running:
        server.config.app.state.feed.end()  # pyright: ignore
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "a server did not drain"
        ledger.close()
