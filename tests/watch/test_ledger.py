"""What every ledger must do (`LedgerSuite`, which `test_ledger_postgres.py` runs as well), and what only SQLite does."""

import os
import random
import signal
import sqlite3
import sqlite3.dbapi2
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from test_alert import alert

from molehunt.errors import InvalidInput, UsageError
from molehunt.watch import ledger as module
from molehunt.watch.alert import Alert, Extreme, Status
from molehunt.watch.ledger import Ledger, LedgerUnavailable

INJECTIONS = (
    "'; DROP TABLE molehunt_alerts; --",
    '" OR 1=1 --',
    "%s %(id)s :id ? $1 {0}",
    "\\'; SELECT pg_sleep(9); --",
    "a\x00b",
    "été \U0001f400 \u202e",
)
RECORD_FOREVER = """
import sys
from molehunt.watch.alert import Alert
from molehunt.watch.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
    while True:
        alert = Alert(
            request="r", action="block", score=1.0, p_value=0.0, fpr=0.01, region="answer", direction="L0 o #0",
            layer=0, span=(0, 1), coverage=1.0, profile=bytes(4096),
        )
        ledger.record(alert)
        print(alert.id, flush=True)
"""


def fill(ledger: Ledger, n: int) -> list[Alert]:
    """`n` alerts, oldest first."""
    alerts = [alert(request=f"r-{i}") for i in range(n)]
    for each in alerts:
        ledger.record(each)
    return alerts


class LedgerSuite:
    """Subclasses give the fixture `url` (an empty place for a ledger) and the two methods."""

    def execute(self, url: str, statement: str) -> list[Any]:
        """Run SQL past the ledger."""
        raise NotImplementedError

    def bytes_on_disk(self, url: str) -> bytes:
        raise NotImplementedError

    @pytest.fixture
    def ledger(self, url: str) -> Iterator[Ledger]:
        with Ledger(url) as ledger:
            yield ledger

    def test_what_is_recorded_is_there_for_the_next_process(self, url: str) -> None:
        written = alert()
        with Ledger(url) as first:
            first.record(written)
        with Ledger(url) as second:
            assert second.get(written.id) == written
            assert second.recent(9) == [written]

    @pytest.mark.parametrize("hostile", INJECTIONS)
    def test_strings_shaped_like_sql_are_only_strings(self, ledger: Ledger, hostile: str) -> None:
        other = fill(ledger, 1)[0]
        written = alert(
            request=hostile,
            direction=hostile,
            tokens=(hostile,),
            token_scores=(1.0,),
            answer=hostile,
            answer_without=hostile,
            extremes=(Extreme(score=1.0, text=hostile),),
        )
        ledger.record(written)
        assert ledger.get(written.id) == written
        assert ledger.get(hostile) is None
        for refused in (
            lambda: ledger.review(hostile, "dismissed"),
            lambda: ledger.mark_absorbed([hostile]),
            lambda: ledger.recent(1, before=hostile),
        ):
            with pytest.raises(UsageError, match="there is no alert"):
                refused()
        assert ledger.recent(9) == [written, other]

    def test_recent_pages_from_the_newest_to_the_oldest(self, ledger: Ledger) -> None:
        newest_first = fill(ledger, 7)[::-1]
        assert ledger.recent(3) == newest_first[:3]
        assert ledger.recent(3, before=newest_first[2].id) == newest_first[3:6]
        assert ledger.recent(3, before=newest_first[5].id) == newest_first[6:]
        assert ledger.recent(3, before=newest_first[6].id) == []

    def test_recent_of_one_status(self, ledger: Ledger) -> None:
        first, second, third = fill(ledger, 3)
        ledger.review(second.id, "confirmed")
        assert ledger.recent(9, status="pending") == [third, first]
        assert [found.id for found in ledger.recent(9, status="confirmed")] == [second.id]
        assert ledger.recent(9, status="dismissed") == []
        assert ledger.recent(9, before=third.id, status="pending") == [first]

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_page_of_nothing_is_refused(self, ledger: Ledger, limit: int) -> None:
        with pytest.raises(UsageError, match="at least 1"):
            ledger.recent(limit)

    def test_pending_counts_what_waits(self, ledger: Ledger) -> None:
        assert ledger.pending() == 0
        alerts = fill(ledger, 3)
        assert ledger.pending() == 3
        ledger.review(alerts[0].id, "dismissed")
        ledger.review(alerts[1].id, "confirmed")
        assert ledger.pending() == 1

    def test_the_same_review_twice_is_one_review(self, ledger: Ledger) -> None:
        kept, other = fill(ledger, 2)
        first, again = ledger.review(kept.id, "confirmed"), ledger.review(kept.id, "confirmed")
        assert first == again == ledger.get(kept.id)
        assert (first.id, first.status) == (kept.id, "confirmed")
        assert ledger.get(other.id) == other

    def test_another_review_is_an_error_that_names_the_first(self, ledger: Ledger) -> None:
        kept = fill(ledger, 1)[0]
        ledger.review(kept.id, "confirmed")
        with pytest.raises(UsageError, match="confirmed") as error:
            ledger.review(kept.id, "dismissed")
        assert not isinstance(error.value, LedgerUnavailable)
        assert [found.status for found in ledger.recent(9)] == ["confirmed"]
        assert list(ledger.unabsorbed()) == []

    def test_pending_is_no_review(self, ledger: Ledger) -> None:
        kept = fill(ledger, 1)[0]
        with pytest.raises(UsageError, match="not pending"):
            ledger.review(kept.id, "pending")

    def test_of_many_reviewers_one_is_first(self, ledger: Ledger) -> None:
        kept = fill(ledger, 1)[0]
        both: tuple[Status, Status] = ("confirmed", "dismissed")
        start = threading.Barrier(8)

        def say(i: int) -> str:
            start.wait()
            try:
                return ledger.review(kept.id, both[i % 2]).status
            except UsageError as error:
                return str(error)

        with ThreadPoolExecutor(8) as pool:
            reported = list(pool.map(say, range(8)))
        stored = ledger.recent(1)[0].status
        assert reported.count(stored) == 4
        assert sum(f"before: {stored}." in each for each in reported) == 4

    def test_only_what_was_dismissed_waits_to_be_absorbed(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PAGE", 2)  # so that five alerts are three pages
        alerts = fill(ledger, 9)
        for benign in alerts[:5]:
            ledger.review(benign.id, "dismissed")
        ledger.review(alerts[5].id, "confirmed")

        waiting = list(ledger.unabsorbed())
        assert [each.id for each in waiting] == [each.id for each in alerts[:5]]
        assert [each.profile for each in waiting] == [each.profile for each in alerts[:5]]
        assert {each.status for each in waiting} == {"dismissed"}

        ledger.mark_absorbed(each.id for each in waiting[:2])
        ledger.mark_absorbed([waiting[1].id])  # again: no harm
        ledger.mark_absorbed([])
        assert [each.id for each in ledger.unabsorbed()] == [each.id for each in alerts[2:5]]

    def test_alerts_can_be_marked_while_they_are_read(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PAGE", 2)
        alerts = fill(ledger, 5)
        for benign in alerts:
            ledger.review(benign.id, "dismissed")
        seen = []
        for each in ledger.unabsorbed():
            ledger.mark_absorbed([each.id])
            seen.append(each.id)
        assert seen == [each.id for each in alerts]
        assert list(ledger.unabsorbed()) == []

    @pytest.mark.parametrize("other", ["pending", "confirmed", "f" * 32])
    def test_nothing_but_a_dismissed_alert_can_be_marked(self, ledger: Ledger, other: str) -> None:
        benign, second = fill(ledger, 2)
        ledger.review(benign.id, "dismissed")
        if other == "confirmed":
            ledger.review(second.id, "confirmed")
        with pytest.raises(UsageError, match=other):
            ledger.mark_absorbed([benign.id, other if len(other) == 32 else second.id])
        assert [each.id for each in ledger.unabsorbed()] == [benign.id], "then none is marked"

    def test_an_id_is_recorded_once(self, ledger: Ledger) -> None:
        kept = fill(ledger, 1)[0]
        with pytest.raises(UsageError, match="already"):
            ledger.record(alert(id=kept.id, score=99.0))
        assert ledger.recent(9) == [kept]

    def test_what_was_reviewed_elsewhere_is_not_recorded(self, ledger: Ledger) -> None:
        with pytest.raises(UsageError, match="confirmed"):
            ledger.record(alert(status="confirmed"))
        assert ledger.recent(9) == []

    def test_half_a_surrogate_pair_is_not_stored(self, ledger: Ledger) -> None:
        with pytest.raises(InvalidInput, match="not Unicode"):
            ledger.record(alert(answer="\udc80"))
        assert ledger.recent(9) == []

    def test_the_oldest_that_are_done_with_go_first(self, url: str) -> None:
        with Ledger(url, keep=4) as ledger:
            alerts = fill(ledger, 4)
            ledger.review(alerts[0].id, "dismissed")
            ledger.review(alerts[2].id, "confirmed")
            ledger.review(alerts[3].id, "confirmed")
            ledger.mark_absorbed([alerts[0].id])
            fifth = fill(ledger, 1)[0]
            assert [each.id for each in ledger.recent(9)] == [fifth.id, alerts[3].id, alerts[2].id, alerts[1].id]
            sixth = fill(ledger, 1)[0]
            assert [each.id for each in ledger.recent(9)] == [sixth.id, fifth.id, alerts[3].id, alerts[1].id]
            with pytest.raises(UsageError, match="there is no alert"):
                ledger.recent(9, before=alerts[0].id)

    def test_what_still_waits_is_never_dropped(self, url: str) -> None:
        with Ledger(url, keep=2) as ledger:
            alerts = fill(ledger, 6)
            assert ledger.pending() == 6, "only pending ones: the ledger grows"
            ledger.review(alerts[0].id, "dismissed")  # waits for calibration
            fill(ledger, 1)
            assert [each.id for each in ledger.unabsorbed()] == [alerts[0].id]
            ledger.mark_absorbed([alerts[0].id])
            for attack in alerts[1:5]:
                ledger.review(attack.id, "confirmed")
            last = fill(ledger, 1)[0]
            assert len(ledger.recent(99)) == ledger.pending() == 3
            assert ledger.recent(1) == [last]

    def test_a_smaller_bound_takes_hold_with_the_next_alert(self, url: str) -> None:
        with Ledger(url) as ledger:
            for each in fill(ledger, 6):
                ledger.review(each.id, "confirmed")
        with Ledger(url, keep=2) as ledger:
            last = fill(ledger, 1)[0]
            assert len(ledger.recent(99)) == 2 and ledger.recent(1) == [last]

    def test_a_bound_below_one_is_refused(self, url: str) -> None:
        with pytest.raises(UsageError, match="at least 1"):
            Ledger(url, keep=0)

    def test_eight_threads_lose_nothing(self, url: str) -> None:
        with Ledger(url) as ledger, ThreadPoolExecutor(8) as pool:
            threads = [pool.submit(fill, ledger, 200) for _ in range(8)]
            reported = [each.id for thread in threads for each in thread.result()]
            assert ledger.pending() == 1600
            assert sorted(each.id for each in ledger.recent(9999)) == sorted(reported)

    def test_eight_threads_hold_the_bound(self, url: str) -> None:
        def confirm(ledger: Ledger) -> None:
            for each in fill(ledger, 25):
                ledger.review(each.id, "confirmed")

        with Ledger(url, keep=10) as ledger, ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(confirm, ledger) for _ in range(8)]:
                done.result()
            last = fill(ledger, 1)[0]
            assert len(ledger.recent(999)) == 10 and ledger.recent(1) == [last]

    def test_many_may_open_a_new_ledger_at_once(self, url: str) -> None:
        start = threading.Barrier(8)

        def open_it(_: int) -> None:
            start.wait()
            with Ledger(url) as ledger:
                fill(ledger, 1)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(open_it, range(8)))
        with Ledger(url) as ledger:
            assert ledger.pending() == 8

    def test_kill_9_loses_nothing_that_was_recorded(self, url: str) -> None:
        reported: list[str] = []
        for after in random.Random(0).sample(range(1, 60), 4):
            child = subprocess.Popen([sys.executable, "-c", RECORD_FOREVER, url], stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            reported += [child.stdout.readline().strip() for _ in range(after)]
            child.send_signal(signal.SIGKILL)
            reported += child.stdout.read().split("\n")[:-1]  # a last line without its end may be cut short
            child.stdout.close()
            assert child.wait() == -signal.SIGKILL
            with Ledger(url) as ledger:
                stored = {each.id for each in ledger.recent(99_999)}
            assert set(reported) <= stored
            assert len(stored) <= len(reported) + 4, "at most one was on its way at each kill"

    def test_without_text_no_text_reaches_the_disk(self, url: str) -> None:
        def secretive(mark: str) -> Alert:
            return alert(
                tokens=(f"{mark}token",),
                token_scores=(1.0,),
                answer=f"{mark}answer",
                answer_without=f"{mark}without",
                extremes=(Extreme(score=1.0, text=f"{mark}extreme"),),
            )

        with Ledger(url, no_text=True) as ledger:
            kept = secretive("hidden")
            ledger.record(kept)
            assert ledger.review(kept.id, "dismissed").no_text
            assert [each.profile for each in ledger.unabsorbed()] == [kept.profile]
            assert kept.id.encode() in self.bytes_on_disk(url)
            assert b"hidden" not in self.bytes_on_disk(url)
        with Ledger(url) as ledger:
            ledger.record(secretive("shown"))
        found = self.bytes_on_disk(url)
        assert all(f"shown{part}".encode() in found for part in ("token", "answer", "without", "extreme"))
        assert b"hidden" not in found

    @pytest.mark.parametrize(
        ("version", "said"), [("0", "that wrote it"), ("2", "Upgrade"), ("1\x1b[2J", "that wrote it")]
    )
    def test_another_version_is_refused(self, url: str, version: str, said: str) -> None:
        Ledger(url).close()
        self.execute(url, f"UPDATE molehunt_meta SET value = '{version}'")
        with pytest.raises(InvalidInput, match=said) as error:
            Ledger(url)
        assert "\x1b" not in str(error.value)

    def test_a_ledger_without_a_version_is_refused(self, url: str) -> None:
        Ledger(url).close()
        self.execute(url, "DELETE FROM molehunt_meta")
        with pytest.raises(InvalidInput, match="schema None"):
            Ledger(url)

    def test_alerts_without_a_version_table_are_refused(self, url: str) -> None:
        Ledger(url).close()
        self.execute(url, "DROP TABLE molehunt_meta")
        with pytest.raises(InvalidInput, match="something else"):
            Ledger(url)

    def test_a_row_that_is_no_alert_is_named(self, url: str) -> None:
        with Ledger(url) as ledger:
            kept = fill(ledger, 1)[0]
            self.execute(url, "UPDATE molehunt_alerts SET alert = 'nonsense'")
            with pytest.raises(InvalidInput, match="this is no alert"):
                ledger.get(kept.id)

    def test_a_table_that_went_away_is_told_without_the_alert(self, url: str) -> None:
        with Ledger(url) as ledger:
            self.execute(url, "DROP TABLE molehunt_alerts")
            with pytest.raises(LedgerUnavailable, match="molehunt_alerts") as error:
                ledger.record(alert(request="confidential"))
        assert "confidential" not in str(error.value) + str(error.value.__context__)

    def test_a_full_pool_of_readers_is_told(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def exhausted(*_: object, **__: object) -> None:
            raise exc.TimeoutError("QueuePool limit reached")

        with Ledger(url) as ledger:
            monkeypatch.setattr(sa.Engine, "connect", exhausted)
            with pytest.raises(LedgerUnavailable, match="limit reached"):
                ledger.pending()


class TestSqlite(LedgerSuite):
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "alerts.db"

    @pytest.fixture
    def url(self, file: Path) -> str:
        return f"sqlite:///{file}"

    def execute(self, url: str, statement: str) -> list[Any]:
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        try:
            with connection:
                return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def bytes_on_disk(self, url: str) -> bytes:
        file = Path(url.removeprefix("sqlite:///"))
        return b"".join(path.read_bytes() for path in sorted(file.parent.glob(f"{file.name}*")))

    def test_readers_and_the_writer_do_not_wait_for_each_other(self, url: str) -> None:
        with Ledger(url) as ledger:
            kept = fill(ledger, 1)
            reader = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM molehunt_alerts").fetchone() == (1,)
            fill(ledger, 1)
            assert reader.execute("SELECT count(*) FROM molehunt_alerts").fetchone() == (1,)
            reader.execute("COMMIT")
            assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            reader.execute("BEGIN IMMEDIATE")
            assert ledger.recent(9)[1:] == kept, "a page can be read while somebody writes"
            reader.close()

    def test_every_commit_is_synced(self, url: str) -> None:
        seen: list[tuple[int]] = []

        def look(connection: sa.Connection, cursor: Any, statement: str, *_: object) -> None:
            if statement.startswith("INSERT INTO molehunt_alerts"):
                raw = connection.connection.dbapi_connection
                assert isinstance(raw, sqlite3.Connection)
                seen.append(raw.execute("PRAGMA synchronous").fetchone())

        event.listen(sa.Engine, "before_cursor_execute", look)
        try:
            with Ledger(url) as ledger, ThreadPoolExecutor(3) as pool:
                for thread in [pool.submit(fill, ledger, 2) for _ in range(3)]:
                    thread.result()
        finally:
            event.remove(sa.Engine, "before_cursor_execute", look)
        assert seen == [(2,)] * 6  # FULL

    def test_only_the_owner_can_read_what_people_said(self, file: Path, url: str) -> None:
        with Ledger(url) as ledger:
            fill(ledger, 1)
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.glob("alerts.db*")}
        assert modes == {"alerts.db": 0o600, "alerts.db-wal": 0o600, "alerts.db-shm": 0o600}

    def test_a_full_disk_is_told_and_what_was_stored_stays(self, url: str) -> None:
        pages = 40

        def limit(connection: sqlite3.Connection, _: object) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages}")

        event.listen(sa.Engine, "connect", limit)
        try:
            with Ledger(url) as ledger:
                stored = []
                with pytest.raises(LedgerUnavailable, match=r"full.*\n.*Free some space"):
                    for _ in range(pages):
                        stored.append(alert(profile=os.urandom(8192)))
                        ledger.record(stored[-1])
                stored.pop()  # the one that was refused
                assert stored and ledger.recent(99) == stored[::-1]
                pages = 400
                ledger.close()  # connections with the new limit
                ledger.record(alert())
                assert ledger.pending() == len(stored) + 1
        finally:
            event.remove(sa.Engine, "connect", limit)

    def test_a_write_that_the_system_refuses_is_told(self, url: str) -> None:
        with Ledger(url) as ledger:
            kept = fill(ledger, 1)
        limited = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
            "from molehunt.errors import MolehuntError\n"
            "try:\n"
            + "".join(f"    {line}\n" for line in RECORD_FOREVER.strip().split("\n"))
            + "except MolehuntError as error:\n    print(type(error).__name__, error, file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", limited, url], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("LedgerUnavailable the ledger")
        reported = done.stdout.split()
        assert len(reported) > 1
        with Ledger(url) as ledger:
            assert [each.id for each in ledger.recent(999)][::-1] == [kept[0].id, *reported]

    def test_a_ledger_that_somebody_locks_is_told(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "WAIT_S", 0.2)
        with Ledger(url) as ledger:
            other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerUnavailable, match=r"locked.*\n.*Another process"):
                ledger.record(alert())
            other.close()
            fill(ledger, 1)

    def test_all_who_queue_for_a_locked_ledger_are_told(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "WAIT_S", 1)
        start = threading.Barrier(8)

        def record() -> str:
            start.wait()
            with pytest.raises(LedgerUnavailable) as error:
                ledger.record(alert())
            return str(error.value)

        with Ledger(url) as ledger, ThreadPoolExecutor(8) as pool:
            other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            threads = [pool.submit(record) for _ in range(8)]
            reported = [thread.result() for thread in threads]
            other.close()
            assert any("database is locked" in each for each in reported)
            assert any("others have written for 1 s" in each for each in reported)
            assert ledger.pending() == 0
            fill(ledger, 1)
            assert ledger.pending() == 1

    @pytest.mark.parametrize("left", [b"no database" * 999, None], ids=["foreign", "cut short"])
    def test_a_broken_file_is_told(self, file: Path, url: str, left: bytes | None) -> None:
        with Ledger(url) as ledger:
            fill(ledger, 20)
        file.write_bytes(left or file.read_bytes()[: 4096 * 3])
        before = file.read_bytes()
        with pytest.raises(InvalidInput, match="broken"), Ledger(url) as ledger:
            ledger.recent(99)
        assert file.read_bytes() == before

    def test_a_database_of_something_else_is_left_alone(self, file: Path, url: str) -> None:
        self.execute(url, "CREATE TABLE bookmarks (page TEXT)")
        before = file.read_bytes()
        with pytest.raises(InvalidInput, match="something else"):
            Ledger(url)
        assert file.read_bytes() == before

    def test_a_path_that_cannot_be_is_told(self, tmp_path: Path) -> None:
        for path in (tmp_path / "missing" / "alerts.db", tmp_path, tmp_path / ("long" * 99), tmp_path / "a\x00b"):
            with pytest.raises(LedgerUnavailable, match="folder that exists"):
                Ledger(f"sqlite:///{path}")

    def test_a_file_that_cannot_be_written_is_told(self, file: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        Ledger(url).close()

        def as_a_reader(*arguments: Any, **named: Any) -> sqlite3.Connection:
            connection = connect(*arguments, **named)  # root may write to a file of mode 0444, so SQLite refuses
            connection.execute("PRAGMA query_only = ON")
            return connection

        connect = sqlite3.dbapi2.connect
        monkeypatch.setattr(sqlite3.dbapi2, "connect", as_a_reader)
        with pytest.raises(LedgerUnavailable, match=r"(?i)read.?only.*\n.*writable"), Ledger(url) as ledger:
            ledger.record(alert())

    def test_a_journal_that_cannot_be_changed_is_told(self, file: Path, url: str) -> None:
        Ledger(url).close()
        self.execute(url, "PRAGMA journal_mode = DELETE")

        def judge(action: int, name: str | None, *_: object) -> int:
            journal = (action, name) == (sqlite3.SQLITE_PRAGMA, "journal_mode")
            return sqlite3.SQLITE_DENY if journal else sqlite3.SQLITE_OK

        def refuse(connection: sqlite3.Connection, _: object) -> None:
            connection.set_authorizer(judge)

        event.listen(sa.Engine, "connect", refuse)
        try:
            with pytest.raises(LedgerUnavailable, match="not authorized"):
                Ledger(url)
        finally:
            event.remove(sa.Engine, "connect", refuse)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "alerts.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite://host/alerts.db",
        "sqlite+aiosqlite:///alerts.db",
        "mysql://user:secret@host/alerts",
        "postgresql+asyncpg://user:secret@host/alerts",
        "postgresql://user:secret@host",
        "postgresql://user:secret@host:port/alerts",
    ],
)
def test_what_is_no_url_of_a_ledger_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="sqlite:///FILE") as error:
        Ledger(url)
    assert "secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UsageError, match=r"pip install .*\[postgres\]"):
        Ledger("postgresql://user@localhost/alerts")
