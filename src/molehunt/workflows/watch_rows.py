"""The rows of a log that a watch has not judged yet."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from molehunt.errors import InvalidInput, UsageError
from molehunt.run.progress import Track, silent
from molehunt.traffic.place import BadLines, Place
from molehunt.traffic.stream import Conversation, read_conversations
from molehunt.workflows.inputs import Texts, conversations
from molehunt.workflows.watch_options import WatchOptions

log = logging.getLogger(__name__)


def unjudged_rows(
    traffic: Texts, options: WatchOptions, *, place: Place, seen: int, bad: BadLines, track: Track = silent
) -> Iterable[Conversation]:
    """The rows that come next.

    A watch in a folder takes `traffic` for the whole log and leaves out the rows up to `place`. A watch in memory takes
    it for the rows that follow, and numbers them on.

    Args:
        place: where the watch stopped.
        seen: number of rows that it has judged.
        bad: counts the rows that are skipped.

    Raises:
        UsageError: the folder holds a watch of another log.
        InvalidInput: a row is broken and `skip_bad` was not given.
    """
    resumed = options.out is not None and seen > 0
    if resumed:
        log.warning("Going on at line %d: %d rows were judged before.", place.line + 1, seen)
    if isinstance(traffic, str | Path):
        rows = _with_advice(
            read_conversations(
                Path(traffic),
                on_bad="skip" if options.skip_bad else "stop",
                bad=bad,
                start_at=place if resumed else Place(),
                shard=options.shard,
                track=track,
            )
        )
    else:
        if resumed and place.offset:
            raise UsageError("the folder holds a watch of a file: give that file, or another folder.")
        mine = (row for row in _listed(traffic, options, bad) if options.shard.mine(row.line - 1))
        rows = (row for row in mine if row.line > place.line) if resumed else mine
    return _renumbered(rows, place.line) if seen and not resumed else rows


def _with_advice(rows: Iterable[Conversation]) -> Iterator[Conversation]:
    try:
        yield from rows
    except InvalidInput as error:
        raise InvalidInput(
            f"{error}\nWith skip_bad (--skip-bad), rows that cannot be read are left out and counted."
        ) from None


def _listed(traffic: Sequence[Any], options: WatchOptions, bad: BadLines) -> Iterator[Conversation]:
    if not options.skip_bad:
        yield from conversations(traffic)
        return
    for number, row in enumerate(traffic, 1):
        try:
            (one,) = conversations([row])
        except InvalidInput as error:
            bad.add(number, str(error).removeprefix("row 1: "), unit="row")
            continue
        yield replace(one, line=number, end=Place(0, number))


def _renumbered(rows: Iterable[Conversation], first: int) -> Iterator[Conversation]:
    for row in rows:
        yield replace(row, line=row.line + first, end=Place(0, row.end.line + first))
