"""Storage: one way to read, list and atomically write files, tables and directories, on disk or on S3.

Locations and whole files are `vas.files`'; here are Parquet files and directories on top of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vas import s3
from vas.errors import VasError
from vas.files import (
    absolute,
    delete,
    exists,
    filesystem,
    identity,
    is_remote,
    join,
    kind_of,
    list_files,
    new_file,
    read_bytes,
    read_lines,
    read_version,
    reason,
    write_bytes,
    write_new,
    write_over,
    writing,
)

T = TypeVar("T")

__all__ = [
    "absolute",
    "copy_directory",
    "count_rows",
    "delete",
    "exists",
    "filesystem",
    "identity",
    "is_remote",
    "join",
    "kind_of",
    "list_files",
    "local_copy",
    "read_bytes",
    "read_lines",
    "read_parts",
    "read_rows",
    "read_table",
    "read_version",
    "write_bytes",
    "write_new",
    "write_over",
    "write_table",
    "write_table_stream",
]


def write_table(location: str, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(location, sink.getvalue().to_pybytes())


def write_table_stream(location: str, tables: Iterable[pa.Table], schema: pa.Schema, row_group_size: int) -> int:
    """Write a Parquet file atomically from tables that come one after another; returns how many rows it has.

    row_group_size: rows; no more than that, and the table that came last, are in memory.
    """
    rows = 0
    with new_file(location) as path:
        with writing(location):
            writer = pq.ParquetWriter(path, schema)
        try:
            for table in _of_size(tables, row_group_size):
                rows += len(table)
                with writing(location):
                    writer.write_table(table, row_group_size)
        finally:
            with writing(location):
                writer.close()
    return rows


def read_table(
    locations: list[str],
    schema: pa.Schema | None = None,
    columns: list[str] | None = None,
    where: pc.Expression | None = None,
) -> pa.Table:
    """Read and concatenate Parquet files. where: of the rows to keep; of the others one file at a time is in memory."""
    tables = []
    for location in locations:
        fs, path = filesystem(location)
        tables.append(_read(location, partial(pq.read_table, path, filesystem=fs, columns=columns, filters=where)))
    if not tables:
        return (schema or pa.schema([])).empty_table()
    return pa.concat_tables(tables, promote_options="default")


def count_rows(location: str) -> int:
    """How many rows a Parquet file has; reads its footer only."""
    fs, path = filesystem(location)
    return _read(location, lambda: pq.read_metadata(path, filesystem=fs).num_rows)


def read_rows(location: str, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
    """Rows start to stop − 1 of a Parquet file, as of a list's slice; reads only the row groups they lie in."""
    fs, path = filesystem(location)

    def read() -> pa.Table:
        with pq.ParquetFile(path, filesystem=fs) as file:
            groups, first, skipped = [], 0, 0
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                if end <= start:
                    skipped = end
                elif first < stop:
                    groups.append(group)
                first = end
            return file.read_row_groups(groups, columns).slice(start - skipped, max(stop - start, 0))

    return _read(location, read)


def read_parts(location: str) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, one after another."""
    fs, path = filesystem(location)
    with _read(location, lambda: pq.ParquetFile(path, filesystem=fs)) as file:
        for group in range(file.num_row_groups):
            yield _read(location, partial(file.read_row_group, group))


def _read(location: str, read: Callable[[], T]) -> T:
    """What `read` returns. Raises VasError if the file cannot be read."""
    for attempt in range(s3.ATTEMPTS):
        try:
            return read()
        except (OSError, pa.ArrowInvalid) as error:
            # S3 was asked for a few bytes and sent an error. pyarrow has room for the bytes only, not for the error's
            # text, and gives up without having understood that it should try again.
            if "flush response stream" not in str(error) or attempt == s3.ATTEMPTS - 1:
                raise VasError(f"cannot read this Parquet file: {reason(error)}", location) from None
        time.sleep(min(0.2 * 2**attempt, 10))
    raise AssertionError


def _of_size(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size`, the last one apart."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(map(len, pending)) >= size:
            joined = pa.concat_tables(pending)
            whole = len(joined) // size * size
            for start in range(0, whole, size):
                yield joined.slice(start, size)
            pending = [joined.slice(whole)]
    if any(map(len, pending)):
        yield pa.concat_tables(pending)


@contextmanager
def local_copy(location: str) -> Iterator[str]:
    """A directory as a local path: itself, or for the time of the block a copy of a remote one."""
    if not is_remote(location):
        yield location
        return
    with tempfile.TemporaryDirectory(prefix="vas-") as folder:
        copy_directory(location, folder)
        yield folder


def copy_directory(source: str, target: str) -> None:
    """Copy every file under one location to another, on any mix of filesystems. Raises VasError."""
    if kind_of(source) != pafs.FileType.Directory:
        raise VasError("there is no such directory", source, "check the path")
    if is_remote(source) and is_remote(target):
        with local_copy(source) as folder:
            copy_directory(folder, target)
    elif source.startswith("s3://"):
        for file in list_files(source, hidden=True):
            path = Path(absolute(target), file[len(source.rstrip("/")) + 1 :])
            if not path.resolve().is_relative_to(Path(absolute(target)).resolve()):  # a key may have `..` in it
                raise VasError("the name of this file leads out of its folder", file)
            with writing(target):
                path.parent.mkdir(parents=True, exist_ok=True)
            s3.objects().download(file, str(path))
    elif target.startswith("s3://"):
        folder = absolute(source)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                s3.objects().upload(join(target, path.relative_to(folder).as_posix()), str(path))
    else:
        source_fs, source_path = filesystem(source)
        target_fs, target_path = filesystem(target)
        with writing(target):
            target_fs.create_dir(target_path, recursive=True)
            pafs.copy_files(source_path, target_path, source_filesystem=source_fs, destination_filesystem=target_fs)
