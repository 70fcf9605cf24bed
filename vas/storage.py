"""Paths and URIs: one way to read, list and atomically write, on disk or on S3.

A location is a string: a local path, `file://…`, `s3://bucket/key` or any URI that
pyarrow knows. S3-compatible stores are found through `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vas.errors import VasError


def is_remote(location: str) -> bool:
    """True for a URI on another machine."""
    return "://" in location and not location.startswith("file://")


def join(location: str, *parts: str) -> str:
    """Append path parts to a location."""
    return "/".join([location.rstrip("/"), *parts])


def absolute(location: str) -> str:
    """The location as any process of this machine finds it, whatever its working directory."""
    return location if is_remote(location) else os.path.abspath(location.removeprefix("file://"))


def filesystem(location: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a location, and the path inside it."""
    if location.startswith("s3://"):
        return _s3(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")), location[5:]
    if is_remote(location):
        try:
            return pafs.FileSystem.from_uri(location)
        except (pa.ArrowInvalid, OSError) as error:
            raise VasError(f"cannot open this kind of URI: {error}", location) from None
    return pafs.LocalFileSystem(), os.path.abspath(location.removeprefix("file://"))


@lru_cache(maxsize=4)
def _s3(endpoint: str | None) -> pafs.FileSystem:
    if endpoint is None:
        return pafs.S3FileSystem()
    url = urlparse(endpoint)
    return pafs.S3FileSystem(endpoint_override=url.netloc, scheme=url.scheme or "https")


def exists(location: str) -> bool:
    """True if a file or directory is there."""
    return kind_of(location) != pafs.FileType.NotFound


def kind_of(location: str) -> pafs.FileType:
    """File, Directory or NotFound. Raises VasError if the store does not answer."""
    fs, path = filesystem(location)
    try:
        return fs.get_file_info(path).type
    except OSError as error:
        raise _unreachable(location, error) from None


def list_files(location: str, suffix: str = "") -> list[str]:
    """Locations of the committed files under a directory, sorted; none if it does not exist.

    What begins with a dot or an underscore, file or folder, is not committed.
    """
    fs, path = filesystem(location)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    scheme = location.split("://")[0] + "://" if is_remote(location) else ""
    try:
        found = fs.get_file_info(selector)
    except OSError as error:
        raise _unreachable(location, error) from None
    inside = len(path.rstrip("/")) + 1
    return sorted(
        scheme + info.path
        for info in found
        if info.is_file
        and info.path.endswith(suffix)
        and not any(part.startswith((".", "_")) for part in info.path[inside:].split("/"))
    )


def read_bytes(location: str) -> bytes:
    """A whole file. Raises VasError if it cannot be read."""
    fs, path = filesystem(location)
    try:
        with fs.open_input_stream(path) as stream:
            return stream.read()
    except OSError as error:
        raise VasError(f"cannot read this file: {_reason(error)}", location, "check the path and its rights") from None


def write_bytes(location: str, content: bytes) -> None:
    """Write a whole file, atomically: readers see the old one or the new one, never half of it."""
    fs, path = filesystem(location)
    remote = is_remote(location)  # an object store's PUT is atomic already
    folder, _, name = path.rpartition("/")
    target = path if remote else f"{folder}/.{name}.{uuid.uuid4().hex}"
    try:
        if not remote:
            fs.create_dir(folder, recursive=True)
        with fs.open_output_stream(target) as stream:
            stream.write(content)
        if not remote:
            os.replace(target, path)
    except OSError as error:
        if not remote:
            with suppress(OSError):
                os.unlink(target)
        raise _unwritable(location, error) from None


def write_table(location: str, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(location, sink.getvalue().to_pybytes())


def read_table(locations: list[str], schema: pa.Schema | None = None, columns: list[str] | None = None) -> pa.Table:
    """Read and concatenate Parquet files."""
    tables = []
    for location in locations:
        fs, path = filesystem(location)
        try:
            tables.append(pq.read_table(path, filesystem=fs, columns=columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise VasError(f"cannot read this Parquet file: {_reason(error)}", location) from None
    if not tables:
        return (schema or pa.schema([])).empty_table()
    return pa.concat_tables(tables, promote_options="default")


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
    source_fs, source_path = filesystem(source)
    target_fs, target_path = filesystem(target)
    try:
        target_fs.create_dir(target_path, recursive=True)
        pafs.copy_files(source_path, target_path, source_filesystem=source_fs, destination_filesystem=target_fs)
    except OSError as error:
        raise _unwritable(target, error) from None


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return re.sub(r".* Detail: \[errno \d+\] ", "", text)  # pyarrow says the path and the call again


def _unreachable(location: str, error: OSError) -> VasError:
    mend = "check the address, the network and your rights"
    if location.startswith("s3://"):
        mend += " (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    return VasError(f"cannot look here: {_reason(error)}", location, mend)


def _unwritable(location: str, error: OSError) -> VasError:
    return VasError(f"cannot write here: {_reason(error)}", location, "check the path, its rights and free space")
