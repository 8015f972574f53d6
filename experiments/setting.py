"""One run of a topic: how large it is, and where its records, models and texts lie."""

from dataclasses import dataclass
from pathlib import Path

from molehunt.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the command line says about a run."""

    topic: str
    quick: bool
    """Whether the run has the size of a smoke test in place of the published one."""
    out: Path
    """Folder of the records; all topics may share it."""
    bench: Path
    """Folder of the planted organisms, as `molehunt bench --out` leaves it."""
    data: Path | None = None
    """Folder of public texts that this repository does not hold."""

    @property
    def records(self) -> Path:
        """The file with one JSON line for each run that is done."""
        return self.records_of(self.topic)

    @property
    def scratch(self) -> Path:
        """The folder for what the runs of this topic leave besides their records."""
        return self.out / self.topic

    def records_of(self, topic: str) -> Path:
        return self.out / f"{topic}.jsonl"

    def need_data(self, what: str) -> Path:
        """The folder of public texts.

        Raises:
            UsageError: none was given; the message says what is missing there.
        """
        if self.data is None:
            raise UsageError(f"{self.topic} needs {what}.\nName the folder that holds it with --data FOLDER.")
        return self.data
