"""The ledger of alerts: a table in SQLite or PostgreSQL. A recorded alert survives kill -9 and power loss.

Nothing is swallowed here: a caller that cannot record an alert hears of it, and can fail closed.
"""

import sqlite3
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from molehunt.errors import InvalidInput, MolehuntError, UsageError, printable
from molehunt.run.extras import install_command
from molehunt.watch.alert import ID, Alert, Status

SCHEMA = 1
KEEP = 10_000
WAIT_S = 10
"""Longest wait for a lock or for a server that does not answer, in seconds. The request behind an alert waits, too."""
PAGE = 64
"""Rows that `unabsorbed` reads at a time."""
CREATE_LOCK = 0x6D6F6C65
"""PostgreSQL's advisory lock while tables are made; CREATE TABLE is not safe against a second one."""

_TABLES = sa.MetaData()
ALERTS = sa.Table(
    "molehunt_alerts",
    _TABLES,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("absorbed", sa.Boolean, nullable=False),
    sa.Column("alert", sa.LargeBinary, nullable=False),  # UTF-8 JSON as bytes: a server may be set to another encoding
    sa.Index("molehunt_alerts_by_status", "status", "seq"),
)
META = sa.Table(
    "molehunt_meta", _TABLES, sa.Column("key", sa.String(32), primary_key=True), sa.Column("value", sa.String(32))
)

SQLITE_ADVICE = {
    sqlite3.SQLITE_FULL: "Free some space on its disk, or keep the ledger elsewhere.",
    sqlite3.SQLITE_CANTOPEN: "It must be a file in a folder that exists and can be written.",
    sqlite3.SQLITE_READONLY: "Make the file and its folder writable, or keep the ledger elsewhere.",
    sqlite3.SQLITE_BUSY: f"Another process has locked it for {WAIT_S} s: end that one, or use PostgreSQL.",
}
POSTGRES_ADVICE = {
    "": "Check that its server runs, and the user, the password and the database in the ledger's URL.",
    "42": "The user needs the right to create, read and write tables there.",
    "53": "Its server is out of disk, memory or connections.",
    "55": f"Another client has locked the table for {WAIT_S} s.",
}
"""Advice by the class of the error, the first two characters of SQLSTATE; a failed connection has none."""
BROKEN = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}


class _Stored(NamedTuple):
    seq: int
    status: Status
    payload: bytes

    def read(self) -> Alert:
        return replace(Alert.from_json(self.payload), status=self.status)  # the JSON says what it was when recorded


_STORED = sa.select(ALERTS.c.seq, ALERTS.c.status, ALERTS.c.alert)


class LedgerUnavailable(UsageError):
    """The ledger cannot be read or written now (disk full, unreachable, locked): nothing was stored."""


class Ledger:
    """The alerts of one deployment. Safe to use from any thread.

    Args:
        url: `sqlite:///FILE` or `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE`.
        no_text: strip what requests and answers say before an alert leaves the process. Earlier alerts stay as they are.
        keep: how many alerts stay. The oldest go first, but never one that still waits for its review or, dismissed,
            for `mark_absorbed`: where only such are left, the ledger grows.

    Raises:
        UsageError: the URL or `keep` cannot be used, or the driver of PostgreSQL is not installed.
        LedgerUnavailable: the file or the server cannot be reached or written. So does every method.
        InvalidInput: this is no ledger, it is broken, or it has another version. So does every method.
    """

    def __init__(self, url: str, *, no_text: bool = False, keep: int = KEEP) -> None:
        if keep < 1:
            raise UsageError(f"a ledger keeps at least 1 alert, not {keep}")
        self._no_text = no_text
        self._keep = keep
        location = _location(url)
        self._place = printable(f"{location.database} on {location.host}" if location.host else f"{location.database}")
        self._turn = threading.Lock()
        self._reads, self._writes = _sqlite(location) if location.drivername == "sqlite" else _postgres(location)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every connection."""
        self._reads.dispose()
        self._writes.dispose()

    def record(self, alert: Alert) -> None:
        """Store `alert`; once this has returned, it is on disk.

        Raises:
            LedgerUnavailable: it is not stored. Whoever judged the request must fail closed.
            InvalidInput: it holds text that is not Unicode.
            UsageError: an alert of this id is stored already, or this one was reviewed elsewhere.
        """
        if alert.status != "pending":
            raise UsageError(f"alert {alert.id} is {alert.status}: what is recorded waits for its review here")
        kept = alert.without_text() if self._no_text else alert
        row = {"id": kept.id, "status": "pending", "absorbed": False, "alert": kept.to_json()}
        with self._transaction(write=True) as connection:
            try:
                connection.execute(sa.insert(ALERTS).values(row))
            except IntegrityError:
                raise UsageError(f"alert {kept.id} is in the ledger already") from None
            self._drop_oldest(connection)

    def amend(self, alert: Alert) -> None:
        """Replace the content of a recorded alert, such as its answer without the direction; its review stays as it is.

        Raises:
            UsageError: no alert of this id is stored (any more).
            InvalidInput: it holds text that is not Unicode.
        """
        kept = alert.without_text() if self._no_text else alert
        with self._transaction(write=True) as connection:
            _known(connection, kept.id)
            connection.execute(sa.update(ALERTS).where(ALERTS.c.id == kept.id).values(alert=kept.to_json()))

    def get(self, id: str) -> Alert | None:
        """The alert of that id, or None."""
        with self._transaction() as connection:
            found = _find(connection, id)
        return None if found is None else found.read()

    def recent(self, limit: int, *, before: str | None = None, status: Status | None = None) -> list[Alert]:
        """Up to `limit` alerts, newest first.

        Args:
            limit: at least 1.
            before: the id of an alert: only older ones. The last alert of a page leads to the next page.
            status: only alerts of this status.

        Raises:
            UsageError: `limit` is below 1, or `before` is not in the ledger (any more).
        """
        if limit < 1:
            raise UsageError(f"a page holds at least 1 alert, not {limit}")
        page = _STORED.order_by(ALERTS.c.seq.desc()).limit(limit)
        if status is not None:
            page = page.where(ALERTS.c.status == status)
        with self._transaction() as connection:
            if before is not None:
                page = page.where(ALERTS.c.seq < _known(connection, before).seq)
            found = connection.execute(page).all()
        return [_Stored(*row).read() for row in found]

    def pending(self) -> int:
        """Number of alerts that wait for a review."""
        with self._transaction() as connection:
            waiting = sa.select(sa.func.count()).select_from(ALERTS).where(ALERTS.c.status == "pending")
            return connection.scalar(waiting) or 0

    def review(self, id: str, status: Status) -> Alert:
        """Settle a pending alert as "confirmed" (an attack) or "dismissed" (benign). The same review again does nothing.

        Raises:
            UsageError: there is no such alert, its first review said otherwise, or `status` is no review.
        """
        if status not in ("confirmed", "dismissed"):
            raise UsageError(f"a review says confirmed or dismissed, not {printable(status)}")
        with self._transaction(write=True) as connection:
            if _known(connection, id).status == "pending":
                first = (ALERTS.c.id == id) & (ALERTS.c.status == "pending")  # another reviewer may be quicker
                connection.execute(sa.update(ALERTS).where(first).values(status=status))
            found = _known(connection, id)
        if found.status != status:
            raise UsageError(f"alert {id} was reviewed before: {found.status}. The first review stands.")
        return found.read()

    def unabsorbed(self) -> Iterator[Alert]:
        """The dismissed alerts that calibration has not absorbed, oldest first."""
        waiting = (ALERTS.c.status == "dismissed") & ~ALERTS.c.absorbed
        after = 0
        while True:
            page = _STORED.where(waiting, ALERTS.c.seq > after).order_by(ALERTS.c.seq).limit(PAGE)
            with self._transaction() as connection:
                found = [_Stored(*row) for row in connection.execute(page)]
            if not found:
                return
            for each in found:  # in no transaction: the reader may take its time, and mark what it has read
                yield each.read()
            after = found[-1].seq

    def mark_absorbed(self, ids: Iterable[str]) -> None:
        """Say that calibration has absorbed these alerts.

        Raises:
            UsageError: one of them is not a dismissed alert of this ledger. Then none is marked.
        """
        with self._transaction(write=True) as connection:
            for id in ids:
                if (status := _known(connection, id).status) != "dismissed":
                    raise UsageError(f"alert {id} is {status}: calibration absorbs only what a reviewer dismissed")
                connection.execute(sa.update(ALERTS).where(ALERTS.c.id == id).values(absorbed=True))

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Generator[Connection]:
        try:
            with self._next_writer() if write else self._reads.connect() as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            raise self._explained(getattr(error, "orig", None) or error) from None

    def _next_writer(self) -> Connection:
        # one thread at a time waits for SQLite's only writer; among many, who has just written would win again
        if not self._turn.acquire(timeout=WAIT_S):
            raise LedgerUnavailable(f"the ledger {self._place} cannot be used: others have written for {WAIT_S} s.")
        try:
            return self._writes.connect()
        finally:
            self._turn.release()

    def _open(self) -> None:
        with self._transaction(write=True) as connection:
            sqlite = connection.dialect.name == "sqlite"
            if not sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATE_LOCK)))
            there = set(sa.inspect(connection).get_table_names())
            if META.name in there:
                self._check_version(connection.scalar(sa.select(META.c.value).where(META.c.key == "schema")))
            elif ALERTS.name in there or (sqlite and there):  # a server's database may well be shared
                raise InvalidInput(f"{self._place} is a database of something else. Give the ledger one of its own.")
            else:
                _TABLES.create_all(connection)
                connection.execute(sa.insert(META).values(key="schema", value=str(SCHEMA)))
        if sqlite:
            self._write_ahead()

    def _check_version(self, version: str | None) -> None:
        if version == str(SCHEMA):
            return
        newer = version is not None and version.isdecimal() and int(version) > SCHEMA
        raise InvalidInput(
            f"the ledger {self._place} has schema {printable(str(version))}; this Molehunt reads {SCHEMA}.\n"
            + ("Upgrade Molehunt" if newer else "Read it with the Molehunt that wrote it")
            + ", or start a new ledger."
        )

    def _write_ahead(self) -> None:
        """Kept in the file; not possible in a transaction, and SQLite does not wait for others who open it now."""
        raw = self._writes.raw_connection()
        until = time.monotonic() + WAIT_S
        try:
            while True:
                try:
                    raw.cursor().execute("PRAGMA journal_mode = WAL")
                    return
                except sqlite3.OperationalError as error:
                    busy = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                    if not busy or time.monotonic() > until:
                        raise
                time.sleep(0.01)
        except sqlite3.Error as error:
            raise self._explained(error) from None
        finally:
            raw.close()

    def _drop_oldest(self, connection: Connection) -> None:
        excess = (connection.scalar(sa.select(sa.func.count()).select_from(ALERTS)) or 0) - self._keep
        if excess <= 0:
            return
        finished = sa.or_(ALERTS.c.status == "confirmed", ALERTS.c.absorbed)
        oldest = sa.select(ALERTS.c.seq).where(finished).order_by(ALERTS.c.seq).limit(excess)
        # two writers must not wait for each other's rows; what one leaves, the next takes
        rows = connection.scalars(oldest.with_for_update(skip_locked=True)).all()
        if rows:
            connection.execute(
                sa.delete(ALERTS).where(ALERTS.c.seq == sa.bindparam("old")), [{"old": seq} for seq in rows]
            )

    def _explained(self, cause: Exception) -> MolehuntError:
        reason = printable(" ".join(str(cause).partition("(Background")[0].split()), limit=300)
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the low byte of an extended code is the plain one
        if code in BROKEN:
            return InvalidInput(f"{self._place} is no ledger, or a broken one: {reason}. Start a new one elsewhere.")
        state = getattr(cause, "sqlstate", "none") or ""
        advice = SQLITE_ADVICE.get(code) or POSTGRES_ADVICE.get(state[:2]) or "No alert is stored until it can."
        return LedgerUnavailable(f"the ledger {self._place} cannot be used: {reason}.\n{advice}")


def _location(url: str) -> URL:
    """The URL, checked and completed. What it says is not repeated: it may hold a password."""
    try:
        location = make_url(url)
    except (ArgumentError, ValueError):
        location = URL.create("nothing")
    if location.drivername == "sqlite":
        file = location.database
        if file and file != ":memory:" and not location.host and not location.query:
            return location
    elif location.drivername in ("postgresql", "postgresql+psycopg") and location.database:
        bounds = {"connect_timeout": f"{WAIT_S}", "tcp_user_timeout": f"{WAIT_S}000"}
        return location.set(drivername="postgresql+psycopg", query={**bounds, **location.query})
    raise UsageError(
        "this is no URL of a ledger. Give sqlite:///FILE (four slashes before an absolute path) "
        "or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE."
    )


def _postgres(location: URL) -> tuple[Engine, Engine]:
    try:
        engine = sa.create_engine(location, hide_parameters=True, pool_pre_ping=True, pool_timeout=WAIT_S)
    except ImportError:
        raise UsageError(f"PostgreSQL needs a driver: {install_command('postgres')}") from None
    event.listen(engine, "begin", _begin_on_postgres)
    return engine, engine


def _sqlite(location: URL) -> tuple[Engine, Engine]:
    """An engine for reading, and one connection for writing: SQLite lets waiting writers wait in no order."""
    file = Path(location.database or "")
    try:
        file.touch(mode=0o600)  # alerts quote people: the file, and what SQLite puts beside it, is for its owner
    except (OSError, ValueError) as error:
        raise LedgerUnavailable(
            f"the ledger {printable(str(file))} cannot be used: {getattr(error, 'strerror', error)}.\n"
            + SQLITE_ADVICE[sqlite3.SQLITE_CANTOPEN]
        ) from None
    by_hand: dict[str, Any] = {"timeout": WAIT_S, "isolation_level": None}  # sqlite3 itself would begin too late
    shared: dict[str, Any] = {"pool_timeout": WAIT_S, "connect_args": by_hand}
    reads = sa.create_engine(location, **shared)
    writes = sa.create_engine(location, pool_size=1, max_overflow=0, **shared)
    event.listen(writes, "begin", _begin_on_sqlite)
    event.listen(writes, "connect", _sync_every_commit)
    return reads, writes


def _sync_every_commit(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous = FULL")


def _begin_on_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # takes the lock now: one that has read first may not wait for it


def _begin_on_postgres(connection: Connection) -> None:
    # a server may be set to answer before it has written; not to us
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{WAIT_S}s'")
    connection.exec_driver_sql(
        "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
    )


def _find(connection: Connection, id: str) -> _Stored | None:
    if not ID.fullmatch(id):  # PostgreSQL refuses some strings (NUL); no alert is called so
        return None
    row = connection.execute(_STORED.where(ALERTS.c.id == id)).one_or_none()
    return None if row is None else _Stored(*row)


def _known(connection: Connection, id: str) -> _Stored:
    found = _find(connection, id)
    if found is None:
        raise UsageError(f"there is no alert {printable(id)} in the ledger; old ones that were reviewed are dropped")
    return found
