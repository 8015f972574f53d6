"""A pytest plugin, `-p tests.foreign_deprecations`: deprecations of other libraries do not fail a test, ours still do.

`make test-latest` and `make test-oldest` load it; `make test`, on the lock, does not. What counts is the code that
raises the warning. A filter cannot see that: it sees the caller that `stacklevel` points to, and a library points to
us when it deprecates what we call.
"""

import sys
import warnings

import pytest

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_warn = warnings.warn


def warn(
    message: str | Warning,
    category: type[Warning] | None = None,
    stacklevel: int = 1,
    source: object = None,
    **options: object,
) -> None:
    """Warn like `warnings.warn`, unless another library than molehunt deprecates something."""
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, DEPRECATIONS):
        raised_by = str(sys._getframe(1).f_globals.get("__name__"))
        if raised_by.partition(".")[0] != "molehunt":
            return
        stacklevel = 1  # ours names the code that raises it, so that the filter below finds it
    _warn(message, category, stacklevel + 1, source, **options)


def pytest_configure(config: pytest.Config) -> None:
    warnings.warn = warn
    for kind in DEPRECATIONS:
        # The later line wins. The first is for warnings raised in C, which `warn` above does not see.
        config.addinivalue_line("filterwarnings", f"ignore::{kind.__name__}")
        config.addinivalue_line("filterwarnings", f"error::{kind.__name__}:molehunt")


def pytest_unconfigure() -> None:
    warnings.warn = _warn
