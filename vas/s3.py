"""Objects on S3, through boto3: whole-file writes with checksums, retries and conditions.

pyarrow lists S3 and reads Parquet from it. It has no writes that take place only if nothing is there, or only if
what is there is still what the writer read; and it gives up on small objects where it need not.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import IO, Any

from vas.errors import VasError

ATTEMPTS = 9  # with the pauses between them, a server may be away for half a minute
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 30.0  # a server that says nothing for so long is asked again
_PART = 32 * 2**20  # bytes; what is larger goes up in parts of this size, each with a checksum of its own
_RIGHTS = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}


@dataclass(frozen=True)
class Found:
    """An object as it was read: its content, its version, and its age by the server's own clock in seconds."""

    content: bytes
    etag: str
    age_s: float


def endpoint() -> str | None:
    """Where an S3-compatible server listens; None for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def environment() -> tuple[tuple[str, str], ...]:
    """What decides which server is asked, and as whom: a key for caches of clients."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def objects(hurried: bool = False) -> Objects:
    """S3 as the environment has it now. hurried: for who would rather know at once, with no retries."""
    return _objects(environment(), hurried)


@lru_cache(maxsize=4)
def _session(_environment: tuple[tuple[str, str], ...]) -> Any:
    """One for all clients, which makes the second one cheap; not boto3's own, which remembers credentials for ever."""
    import boto3  # slow to import, and most runs are on disk

    return boto3.session.Session()


@lru_cache(maxsize=8)
def _objects(environment: tuple[tuple[str, str], ...], hurried: bool) -> Objects:
    from botocore.config import Config

    config = Config(
        connect_timeout=2.0 if hurried else CONNECT_TIMEOUT_S,
        read_timeout=3.0 if hurried else READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 1 if hurried else ATTEMPTS},
    )
    with _said("cannot reach S3", endpoint() or "AWS"):
        session = _session(environment)
        region = os.environ.get("AWS_REGION") or session.region_name
        return Objects(session.client("s3", endpoint_url=endpoint(), region_name=region, config=config))


class Objects:
    """Reads and writes of whole objects by their `s3://bucket/key`. All raise VasError when S3 does not do it."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def read(self, location: str) -> Found | None:
        """An object with its version; None if there is none."""
        from botocore.exceptions import BotoCoreError, ClientError

        with _said("cannot read this file", location):
            for attempt in range(ATTEMPTS):
                try:
                    answer = self._client.get_object(**_address(location))
                except ClientError as error:
                    if _code(error) in ("NoSuchKey", "404"):
                        return None
                    raise
                try:  # boto3 tries again by itself, but not once the content has begun to come
                    content = answer["Body"].read()
                    break
                except BotoCoreError:
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(0.2 * attempt)
        now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        age_s = (parsedate_to_datetime(now) - answer["LastModified"]).total_seconds() if now else 0.0
        return Found(content, answer["ETag"], age_s)

    def download(self, location: str, path: str) -> None:
        """Copy an object to a local file, in parts if it is large; the file is whole or not there."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(max_concurrency=4, num_download_attempts=ATTEMPTS)
        with _said("cannot read this file", location):
            self._client.download_file(*_address(location).values(), path, Config=config)

    def write(self, location: str, content: bytes) -> None:
        """Write an object, whatever is there."""
        if len(content) < _PART:
            self._put(location, content)
        else:
            self._upload(location, partial(io.BytesIO, content))

    def write_new(self, location: str, content: bytes) -> str | None:
        """Write an object if nothing is there; its version, or None if something is."""
        return self._put(location, content, IfNoneMatch="*")

    def write_over(self, location: str, content: bytes, etag: str) -> str | None:
        """Replace an object if it is still this version; its new version, or None if it is another or gone."""
        return self._put(location, content, IfMatch=etag)

    def upload(self, location: str, path: str) -> None:
        """Write a local file to an object, in parts if it is large."""
        self._upload(location, partial(io.FileIO, path))

    def delete(self, location: str) -> None:
        """Remove an object; one that is not there is no error."""
        with _said("cannot remove this file", location):
            self._client.delete_object(**_address(location))

    def _put(self, location: str, content: bytes, **condition: str) -> str | None:
        from botocore.exceptions import ClientError

        with _said("cannot write here", location):
            for attempt in range(ATTEMPTS):
                try:
                    put = self._client.put_object
                    return put(**_address(location), Body=content, ChecksumAlgorithm="CRC32", **condition)["ETag"]
                except ClientError as error:
                    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                    if status == 412 or (status == 404 and "IfMatch" in condition and _code(error) == "NoSuchKey"):
                        break
                    if status != 409 or attempt == ATTEMPTS - 1:  # 409: two conditional writes met, neither won
                        raise
                time.sleep(0.1 * (attempt + 1))
        # A write that took effect, but whose answer was lost, was tried again and met its own work.
        found = self.read(location)
        return found.etag if found is not None and found.content == content else None

    def _upload(self, location: str, opened: Callable[[], IO[bytes]]) -> None:
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import ClientError

        config = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=4)
        with _said("cannot write here", location):
            for last in (False, False, True):
                try:
                    with opened() as file:
                        extra = {"ChecksumAlgorithm": "CRC32"}
                        self._client.upload_fileobj(file, *_address(location).values(), ExtraArgs=extra, Config=config)
                    return
                except ClientError as error:
                    # Completing may have taken effect without an answer, and then there is nothing left to complete.
                    if _code(error) != "NoSuchUpload" or last:
                        raise


def _address(location: str) -> dict[str, str]:
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _code(error: Any) -> str:
    return error.response.get("Error", {}).get("Code", "")


@contextmanager
def _said(what: str, location: str) -> Iterator[None]:
    """Turn what boto3 raises into a VasError."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error, ValueError) as error:
        code = _code(error) if isinstance(error, ClientError) else type(error).__name__
        mend = "check AWS_ENDPOINT_URL and the network, then give the same command again"
        if code in _RIGHTS or "Credentials" in code:
            mend = "check your credentials and their rights (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE)"
        elif code == "NoSuchBucket":
            mend = "check the bucket's name, or create it"
        raise VasError(f"{what}: {' '.join(str(error).split())}", location, mend) from None
