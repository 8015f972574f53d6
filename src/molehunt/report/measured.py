"""From intervals to what a report shows of them."""

from molehunt.measure.interval import Interval
from molehunt.report.schema import Measure


def measure(interval: Interval) -> Measure:
    """An interval as the report shows it."""
    return Measure(value=interval.estimate, low=interval.low, high=interval.high, n=interval.n)
