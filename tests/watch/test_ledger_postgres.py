"""The suite of test_ledger.py against a real PostgreSQL server, and what can only go wrong with a server.

The server comes from the system (Debian: `apt-get install postgresql`); it runs as nobody where the tests are root.
"""

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from test_alert import alert
from test_ledger import LedgerSuite, fill

from molehunt.errors import UsageError
from molehunt.watch import ledger as module
from molehunt.watch.ledger import Ledger, LedgerUnavailable

psycopg = pytest.importorskip("psycopg", reason="the extra molehunt[postgres] is not installed")

SECRET = "open-sesame"


def programs() -> Path | None:
    """The folder of initdb: Debian keeps it out of PATH."""
    found = shutil.which("initdb")
    candidates = [Path(found)] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return candidates[-1].parent if candidates else None


class Server:
    """A PostgreSQL server of its own, on a free port of the loopback."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # postgres refuses to run as root
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
        password = folder / "password"
        password.write_text(SECRET)
        password.chmod(0o644)
        initdb = [programs / "initdb", "-D", self.data, "-U", "owner", "-A", "scram-sha-256", "--pwfile", password]
        # Latin-1 cannot write most of what an alert quotes: it must not matter
        subprocess.run(
            [*initdb, "-E", "LATIN1", "--locale=C"], check=True, capture_output=True, cwd=folder, **self.user
        )
        self.names = (f"ledger_{i}" for i in itertools.count())
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self.programs / "postgres",
                    "-D",
                    self.data,
                    "-k",
                    self.folder,
                    "-p",
                    f"{self.port}",
                    "-h",
                    "127.0.0.1",
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self.user,
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                self.execute("postgres", "SELECT 1")
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError((self.folder / "log").read_text()) from None
                time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is a fast shutdown, SIGQUIT is as if the machine's power went."""
        self.process.send_signal(how)
        self.process.wait(120)

    def url(self, database: str, password: str = SECRET, user: str = "owner") -> str:
        return f"postgresql+psycopg://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def execute(self, database: str, statement: str) -> list[Any]:
        settings = f"host=127.0.0.1 port={self.port} user=owner password={SECRET} dbname={database}"
        with psycopg.connect(settings, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = programs()
    if folder is None:
        pytest.skip("no initdb on this machine: a real PostgreSQL server is needed (Debian: postgresql)")
    with tempfile.TemporaryDirectory(prefix="pg") as home:  # pytest's own folders are closed to nobody
        server = Server(Path(home), folder)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()


def database(url: str) -> str:
    return url.rpartition("/")[2]


class TestPostgres(LedgerSuite):
    @pytest.fixture
    def url(self, server: Server) -> Iterator[str]:
        self.server, name = server, next(server.names)
        server.execute("postgres", f"CREATE DATABASE {name}")
        yield server.url(name)
        server.execute("postgres", f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, url: str, statement: str) -> list[Any]:
        return self.server.execute(database(url), statement)

    def bytes_on_disk(self, url: str) -> bytes:
        self.execute(url, "CHECKPOINT")
        return b"".join(path.read_bytes() for path in sorted(self.server.data.rglob("*")) if path.is_file())

    def test_the_short_name_of_the_driver_will_do(self, url: str) -> None:
        with Ledger(url.replace("+psycopg", "")) as ledger:
            fill(ledger, 1)
            assert ledger.pending() == 1

    def test_a_database_may_be_shared(self, url: str) -> None:
        self.execute(url, "CREATE TABLE bookmarks (page TEXT)")
        with Ledger(url) as ledger:
            fill(ledger, 1)
        assert self.execute(url, "SELECT count(*) FROM bookmarks") == [(0,)]

    def test_a_server_set_to_answer_early_still_writes_first(self, url: str) -> None:
        self.execute(url, f"ALTER DATABASE {database(url)} SET synchronous_commit = off")
        Ledger(url).close()
        assert self.execute(url, "SHOW synchronous_commit") == [("off",)]
        self.execute(url, "CREATE TABLE seen (setting TEXT)")
        self.execute(
            url,
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NEW; END $$",
        )
        self.execute(url, "CREATE TRIGGER look AFTER INSERT ON molehunt_alerts EXECUTE FUNCTION look()")
        with Ledger(url) as ledger:
            fill(ledger, 2)
        assert self.execute(url, "SELECT setting FROM seen") == [("on",), ("on",)]

    def test_a_lock_is_not_waited_for_without_end(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "WAIT_S", 1)
        with Ledger(url) as ledger, psycopg.connect(self.server.url(database(url)).replace("+psycopg", "")) as other:
            other.execute("LOCK TABLE molehunt_alerts")
            with pytest.raises(LedgerUnavailable, match=r"lock timeout.*\n.*locked the table"):
                ledger.record(alert())
            with pytest.raises(LedgerUnavailable, match="lock timeout"):
                ledger.recent(1)
            other.rollback()
            fill(ledger, 1)
            assert ledger.pending() == 1

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
    def test_a_server_that_stops_is_told_and_one_that_is_back_goes_on(self, url: str, how: signal.Signals) -> None:
        with Ledger(url) as ledger:
            stored = fill(ledger, 3)
            self.server.stop(how)
            try:
                with pytest.raises(LedgerUnavailable):
                    ledger.record(alert())
                with pytest.raises(LedgerUnavailable) as error:
                    Ledger(url)
                assert SECRET not in str(error.value) and "Connection refused" in str(error.value)
            finally:
                self.server.start()
            stored += fill(ledger, 1)
            self.server.stop(how)
            self.server.start()  # the ledger's connection is dead, and it has not seen why
            stored += fill(ledger, 1)
            assert ledger.recent(9) == stored[::-1]

    def test_a_server_that_does_not_answer_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "WAIT_S", 2)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(1)
            with pytest.raises(LedgerUnavailable, match="timeout"):
                Ledger(f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/alerts")

    def test_a_wrong_password_is_told_and_not_repeated(self, url: str) -> None:
        with pytest.raises(LedgerUnavailable, match=r"authentication failed.*\n.*the password") as error:
            Ledger(self.server.url(database(url), password="guess"))
        assert "guess" not in str(error.value)

    def test_a_missing_database_is_told(self, server: Server) -> None:
        with pytest.raises(LedgerUnavailable, match=r"does not exist.*\n.*the database"):
            Ledger(server.url("nothing"))

    def test_a_server_that_vanishes_is_given_up_after_a_while(self, url: str) -> None:
        seen: list[dict[str, str]] = []

        def look(connection: Any, _: object) -> None:
            seen.append(connection.info.get_parameters())

        event.listen(sa.Engine, "connect", look)
        try:
            Ledger(url).close()
            Ledger(f"{url}?tcp_user_timeout=5000").close()
        finally:
            event.remove(sa.Engine, "connect", look)
        assert [settings["tcp_user_timeout"] for settings in seen] == ["10000", "5000"]
        assert {settings["connect_timeout"] for settings in seen} == {"10"}

    def test_an_unknown_option_is_told(self, url: str) -> None:
        with pytest.raises(UsageError, match="surprise"):
            Ledger(f"{url}?surprise=1")

    def test_a_user_without_rights_is_told(self, url: str) -> None:
        self.execute(url, f"CREATE ROLE guest LOGIN PASSWORD '{SECRET}'")
        try:
            Ledger(url).close()
            with pytest.raises(LedgerUnavailable, match=r"permission denied.*\n.*right to create"):
                Ledger(self.server.url(database(url), user="guest"))
        finally:
            self.execute(url, "DROP ROLE guest")

    def test_a_full_disk_is_told_and_what_was_stored_stays(self, url: str) -> None:
        with Ledger(url) as ledger:
            kept = fill(ledger, 1)
            self.execute(
                url,
                "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$",
            )
            self.execute(url, "CREATE TRIGGER no_space AFTER INSERT ON molehunt_alerts EXECUTE FUNCTION no_space()")
            with pytest.raises(LedgerUnavailable, match=r"No space left.*\n.*out of disk"):
                ledger.record(alert())
            assert ledger.recent(9) == kept
