"""The speed of counted work and the time that the rest will take: the text of every progress line."""

SETTLING = 2.0
"""Seconds at the start that do not count towards the speed: items done in them may come from an earlier run."""
TICK = 1e-9
"""Shortest time in seconds from which a speed is computed: a clock may not resolve less."""
RECENT = 1.0
"""Seconds for which a speed that was measured during `SETTLING` may be shown."""


class Pace:
    """The progress of one track. Times are seconds of any one clock."""

    def __init__(self, what: str, total: int | None, *, unit: str = "", start: int = 0, now: float) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = start
        self.began = now
        self._start = start
        self._last = now
        """When the latest item was done."""
        self._from = now, start
        """Time and count from which the speed is measured."""

    def tick(self, now: float) -> None:
        """Count one more item as done."""
        self.done += 1
        self._last = now
        if now - self.began < SETTLING:
            self._from = now, self.done

    def rate(self, now: float) -> float | None:
        """Number of items per second; None while that is not known."""
        since, before = self._from
        done, seconds = self.done - before, max(self._last - since, now - self._last)
        if not done and now - since < RECENT:
            done, seconds = self.done - self._start, since - self.began
        return done / seconds if done > 0 and seconds > TICK else None

    def left(self, now: float) -> float | None:
        """Seconds until all items are done; None while that is not known."""
        rate = self.rate(now)
        if rate is None or self.total is None:
            return None
        waited = now - self._last
        stalled = waited > self._last - self._from[0]
        return max(0.0, (self.total - self.done) / rate - (0.0 if stalled else waited))

    def text(self, now: float) -> str:
        """Progress as text, such as `320 of 2000 rows, 41 rows/s, 41 s left`."""
        parts: list[str] = []
        if self.done or self.total is not None:
            counted = f"{self.done} of {self.total}" if self.total is not None else f"{self.done}"
            parts.append(f"{counted} {self.unit}".rstrip())
        rate, left = self.rate(now), self.left(now)
        if rate is not None and self.unit:
            parts.append(rate_text(rate, self.unit))
        parts.append(f"{time_text(now - self.began)} so far" if left is None else f"{time_text(left)} left")
        return ", ".join(parts)

    def line(self, now: float) -> str:
        """The name of the work, followed by `text`."""
        return f"{self.what}: {self.text(now)}"


def rate_text(per_second: float, unit: str) -> str:
    """A speed as text, such as `41 rows/s`, `3.2 rows/s` or `24 rows/min`: per the shortest unit of time that gives at least 1."""
    for seconds, name in ((1, "s"), (60, "min")):
        if per_second * seconds >= 1:
            return f"{_short(per_second * seconds)} {unit}/{name}"
    return f"{_short(per_second * 3600)} {unit}/h"


def time_text(seconds: float) -> str:
    """A duration as text, such as `41 s`, `12 min` or `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
