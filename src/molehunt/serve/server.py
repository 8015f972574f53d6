"""The application on a socket: listens, reports its address, and drains on a signal."""

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from molehunt.errors import UsageError
from molehunt.model.pair import ModelPair
from molehunt.serve.app import Settings, create_app
from molehunt.serve.connections import ImpatientProtocol
from molehunt.serve.feed import Feed
from molehunt.serve.guard import Guard
from molehunt.serve.keys import Keys

DRAIN_S = 60
"""Seconds that running answers may still take."""
MAX_CONNECTIONS = 1024


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._feed.end()  # open pages would otherwise be waited for
        super().handle_exit(sig, frame)


def run_server(
    pair: ModelPair,
    guard: Guard,
    keys: Keys,
    settings: Settings,
    *,
    host: str,
    port: int,
    listening: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; running answers are finished first.

    Args:
        listening: called with the URL once connections are accepted.

    Raises:
        UsageError: the address cannot be listened on, or the backend cannot run this model.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"{host} port {port} cannot be listened on: {error.strerror}. Give another --port."
            ) from None
        app = create_app(pair, guard, keys, settings)
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            log_level="warning",
            access_log=False,
            use_colors=False,  # stderr escapes control sequences
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=DRAIN_S,
        )
        sock.listen()
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        listening(f"http://{shown}:{sock.getsockname()[1]}")
        _Server(config, app.state.feed).run(sockets=[sock])
