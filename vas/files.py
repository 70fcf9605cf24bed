"""Whole files by their location: listed, read and atomically written, on disk or on S3.

A location is a string: a local path, `file://…`, `s3://bucket/key` or any URI that
pyarrow knows. S3-compatible stores are found through `AWS_ENDPOINT_URL`. pyarrow looks
and lists everywhere, and reads and writes but on S3, where `vas.s3` does.
"""

from __future__ import annotations

import errno
import io
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

from vas import s3
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
        if not location[5:] or "//" in f"/{location[5:].rstrip('/')}":
            raise VasError(
                "an S3 location has a bucket, and nothing empty in its path", location, "e.g. s3://bucket/runs"
            )
        try:
            return _s3(s3.environment()), location[5:]
        except pa.ArrowInvalid as error:
            raise VasError(
                f"cannot use this S3 endpoint: {error}",
                f"AWS_ENDPOINT_URL={s3.endpoint()}",
                "e.g. http://localhost:9000",
            ) from None
    if is_remote(location):
        try:
            return pafs.FileSystem.from_uri(location)
        except (pa.ArrowInvalid, OSError) as error:
            raise VasError(f"cannot open this kind of URI: {error}", location) from None
    return pafs.LocalFileSystem(), os.path.abspath(location.removeprefix("file://"))


@lru_cache(maxsize=4)
def _s3(_environment: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    patience = {
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=s3.ATTEMPTS),
        "connect_timeout": s3.CONNECT_TIMEOUT_S,
        "request_timeout": s3.READ_TIMEOUT_S,  # of silence, not of the whole transfer
    }
    if (endpoint := s3.endpoint()) is None:
        return pafs.S3FileSystem(**patience)
    url = urlparse(endpoint)
    return pafs.S3FileSystem(endpoint_override=url.netloc, scheme=url.scheme or "https", **patience)


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


def list_files(location: str, suffix: str = "", hidden: bool = False) -> list[str]:
    """Locations of the committed files under a directory, sorted; none if it does not exist.

    What begins with a dot or an underscore, file or folder, is not committed. hidden: list that too.
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
        and (hidden or not any(part.startswith((".", "_")) for part in info.path[inside:].split("/")))
    )


def read_bytes(location: str) -> bytes:
    """A whole file. Raises VasError if it cannot be read."""
    if location.startswith("s3://"):
        if (found := s3.objects().read(location)) is None:
            raise VasError("cannot read this file: No such file", location, "check the path and its rights")
        return found.content
    fs, path = filesystem(location)
    try:
        with fs.open_input_stream(path) as stream:
            return stream.read()
    except OSError as error:
        raise _unreadable(location, error) from None


def read_lines(location: str) -> Iterator[bytes]:
    """A file's lines, without their ends, read as they are asked for. Raises VasError if it cannot be read."""
    with tempfile.TemporaryDirectory(prefix="vas-") as folder:
        source = location
        if location.startswith("s3://"):
            s3.objects().download(location, source := os.path.join(folder, "file"))
        fs, path = filesystem(source)
        try:
            with fs.open_input_stream(path) as stream:
                for line in io.BufferedReader(stream):
                    yield from line.splitlines()  # some files have none but carriage returns
        except OSError as error:
            raise _unreadable(location, error) from None


def _unreadable(location: str, error: OSError) -> VasError:
    return VasError(f"cannot read this file: {reason(error)}", location, "check the path and its rights")


def read_version(location: str) -> tuple[bytes, str] | None:
    """A whole file and its version, for `write_over`; None if there is none. Only S3 tells versions apart."""
    if location.startswith("s3://"):
        found = s3.objects().read(location)
        return (found.content, found.etag) if found is not None else None
    return (read_bytes(location), "") if exists(location) else None


def identity(location: str) -> tuple[str, int, int]:
    """A file's name, size in bytes and time of its last change: other content has another one."""
    fs, path = filesystem(location)
    info = fs.get_file_info(path)
    return info.base_name, info.size or 0, info.mtime_ns or 0


def write_bytes(location: str, content: bytes) -> None:
    """Write a whole file, atomically: readers see the old one or the new one, never half of it."""
    if location.startswith("s3://"):
        s3.objects().write(location, content)
        return
    with new_file(location) as path, writing(location), open(path, "wb") as file:
        file.write(content)


def write_new(location: str, content: bytes) -> str | None:
    """Write a whole file, atomically, if nothing is there: of several writers one succeeds.

    Returns its version, or None if something is there.
    """
    if location.startswith("s3://"):
        return s3.objects().write_new(location, content)
    if is_remote(location):  # nothing better is to be had
        if exists(location):
            return None
        write_bytes(location, content)
        return ""
    path = absolute(location)
    with _beside(location) as temporary, writing(location):
        with open(temporary, "wb") as file:
            file.write(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            with suppress(FileExistsError), open(path, "xb") as file:  # a disk without hard links
                file.write(content)
                return ""
            return None
    return ""


def write_over(location: str, content: bytes, version: str) -> str | None:
    """Replace a whole file, atomically, if it is still what `read_version` or another write gave this version.

    Returns its new version, or None if it is another or gone. On disk it is replaced whatever it is.
    """
    if location.startswith("s3://"):
        return s3.objects().write_over(location, content, version)
    write_bytes(location, content)
    return ""


def delete(location: str) -> None:
    """Remove a file; one that is not there is no error."""
    if location.startswith("s3://"):
        return s3.objects().delete(location)
    fs, path = filesystem(location)
    try:
        fs.delete_file(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise VasError(f"cannot remove this file: {reason(error)}", location, "check its rights") from None


def _to_disk(path: str) -> None:
    """Wait until a file's content is on the disk itself."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def new_file(location: str) -> Iterator[str]:
    """A local path for the block to write to; what it wrote comes to `location` at its end, whole, unless it fails."""
    if not is_remote(location):
        with _beside(location) as temporary:
            yield temporary
            with writing(location):
                _to_disk(temporary)  # else a machine that loses power may have the name without the content
                os.replace(temporary, absolute(location))
        return
    with tempfile.TemporaryDirectory(prefix="vas-") as folder:
        yield (path := os.path.join(folder, "file"))
        if location.startswith("s3://"):
            s3.objects().upload(location, path)
            return
        fs, target = filesystem(location)
        with writing(location):
            fs.create_dir(target.rpartition("/")[0], recursive=True)
            pafs.copy_files(path, target, destination_filesystem=fs)


@contextmanager
def _beside(location: str) -> Iterator[str]:
    """A path for a file that is not committed, in the folder of `location`; it is gone at the end."""
    folder, name = os.path.split(absolute(location))
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    with writing(location):
        os.makedirs(folder, exist_ok=True)
    try:
        yield temporary
    finally:
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def writing(location: str) -> Iterator[None]:
    """Turn what the block cannot write into a VasError."""
    try:
        yield
    except OSError as error:
        mend = "check the path, its rights and free space"
        raise VasError(f"cannot write here: {reason(error)}", location, mend) from None


def reason(error: Exception) -> str:
    """Why a file cannot be had, in a line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return re.sub(r".* Detail: \[errno \d+\] ", "", text)  # pyarrow says the path and the call again


def _unreachable(location: str, error: OSError) -> VasError:
    mend = "check the address, the network and your rights"
    if location.startswith("s3://"):
        mend += " (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    return VasError(f"cannot look here: {reason(error)}", location, mend)
