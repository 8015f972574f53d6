"""One difference between two folders."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["finding", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderDifference:
    """One difference between the folders. Texts are unchanged and untrusted: print them through `printable`."""

    file: str
    key: str
    base: str
    tuned: str
    severity: Severity
    why: str
