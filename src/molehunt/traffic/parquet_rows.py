"""Rows of a parquet file, with only the columns that are read, a few rows in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.extras import install_command
from molehunt.run.progress import Track, counting
from molehunt.traffic.delimited import no_column
from molehunt.traffic.place import Place, no_row
from molehunt.traffic.rows import KEPT, READ

BATCH = 64
"""Number of rows that are unpacked at a time."""
MAGIC = b"PAR1"


def parquet_rows(path: Path, start_at: Place, track: Track) -> Iterator[tuple[Place, Any]]:
    """Each row as an object, with its end.

    Raises:
        UsageError: parquet needs its extra, or no row begins at `start_at`.
        InvalidInput: the file is broken, or no column is read.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            f"reading parquet needs an extra: {install_command('parquet')}, or convert the file to JSONL"
        ) from None
    name = printable(path.name)
    try:
        file = parquet.ParquetFile(path)
        if not 0 <= start_at.line <= file.metadata.num_rows:
            raise no_row(name, start_at)
        names = [column for column in file.schema_arrow.names if column.strip().lower() in KEPT]
        if not any(column.strip().lower() in READ for column in names):
            raise no_column(name, file.schema_arrow.names)
        end = 0
        all_rows = file.metadata.num_rows
        with counting(track, f"reading {name}", all_rows, start=start_at.line) as done:
            for group in range(file.num_row_groups):
                line, end = end, end + file.metadata.row_group(group).num_rows
                if end <= start_at.line:
                    continue
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=names):
                    for row in batch.to_pylist():
                        line += 1
                        if line > start_at.line:
                            yield Place(line, line), row
                            done(1)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise InvalidInput(f"{name} is no whole parquet file: {printable(str(error))}") from error
