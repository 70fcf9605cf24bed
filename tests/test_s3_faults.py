"""An S3 server that fails now and then: what is written is right, or it is said that it is not."""

import json
import os
import time

import pyarrow as pa
import pytest
from s3_proxy import KINDS, s3_proxy

from vas import s3, storage
from vas.errors import VasError
from vas.run import lock
from vas.run.holder import Holder

TABLE = pa.table({"n": list(range(1000)), "text": [str(number) * 20 for number in range(1000)]})

SMALL = pa.table({"n": [1, 2, 3, 4]})


@pytest.fixture
def through(s3_store, monkeypatch, request):
    """Makes a proxy that this test goes through; yields a function of its settings."""
    proxies = []

    def start(**settings):
        opened = s3_proxy(s3_store, **settings)
        proxies.append(opened)
        proxy = opened.__enter__()
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        return proxy

    yield start
    for opened in proxies:
        opened.__exit__(None, None, None)


@pytest.fixture
def place(request):
    return f"s3://test/{request.node.name.replace('[', '-').rstrip(']')}"


@pytest.fixture
def impatient(monkeypatch):
    """A client that notices a silent server soon."""
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.0)


def test_without_faults_the_proxy_changes_nothing(through, place, monkeypatch):
    proxy = through()
    monkeypatch.setattr(s3, "_PART", 5 * 2**20)
    content = os.urandom(2**20) * 6
    for name, each in {"empty": b"", "small": b"x", "large": content, "a b+c=ü": b"y"}.items():
        storage.write_bytes(f"{place}/{name}", each)
        assert storage.read_bytes(f"{place}/{name}") == each
    assert proxy.requests > 10
    assert not proxy.injected


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_is_got_over(through, place, kind, impatient):
    proxy = through(stall_s=1.3)
    file = f"{place}/file"
    proxy.plan(kind, only="^PUT .*/file")
    storage.write_bytes(file, b"content")
    proxy.plan(kind, only="^GET .*/file")
    assert storage.read_bytes(file) == b"content"
    proxy.plan(kind, only="^GET .*list-type")
    assert storage.list_files(place) == [file]
    proxy.plan(kind, only="^HEAD .*/file")
    assert storage.exists(file)
    assert proxy.injected[kind] == 4


@pytest.mark.parametrize("kind", ["error", "slow_down", "reset_after", "cut"])
def test_tables_and_directories_are_read_all_the_same(through, place, tmp_path, kind):
    proxy = through()
    storage.write_table_stream(f"{place}/rows.parquet", [SMALL], SMALL.schema, 2)
    storage.write_bytes(f"{place}/a/b", b"x")
    proxy.plan(kind, "", kind, only="^GET .*/rows.parquet")
    assert storage.read_table([f"{place}/rows.parquet"], columns=["n"]).equals(SMALL)
    proxy.plan(kind, only="^GET .*/rows.parquet")
    assert storage.read_rows(f"{place}/rows.parquet", 1, 3).equals(SMALL.slice(1, 2))
    proxy.plan(kind, only="^GET .*/a/b")
    storage.copy_directory(place, str(tmp_path))
    assert (tmp_path / "a" / "b").read_bytes() == b"x"
    proxy.plan(kind, only="^PUT .*/a/b")
    storage.copy_directory(str(tmp_path), f"{place}/again")
    assert storage.read_bytes(f"{place}/again/a/b") == b"x"
    assert proxy.injected[kind] >= 4


@pytest.mark.parametrize("kind", ["reset_after", "error_after", "stall"])
def test_a_conditional_write_whose_answer_is_lost_knows_its_own_work(through, place, kind, impatient):
    proxy = through(stall_s=1.3)
    proxy.plan(kind, only="^PUT .*/file")
    first = storage.write_new(f"{place}/file", b"mine")
    assert first is not None
    assert storage.write_new(f"{place}/file", b"theirs") is None
    proxy.plan(kind, only="^PUT .*/file")
    second = storage.write_over(f"{place}/file", b"mine too", first)
    assert storage.read_version(f"{place}/file") == (b"mine too", second)
    assert storage.write_over(f"{place}/file", b"theirs", first) is None
    assert proxy.injected[kind] == 2


def test_a_large_file_whose_completion_is_not_answered_is_whole(through, place, monkeypatch):
    proxy = through()
    monkeypatch.setattr(s3, "_PART", 5 * 2**20)
    content = os.urandom(2**20) * 11
    proxy.plan("error_after", "reset_after", only="^POST .*uploadId")
    proxy.plan("cut", only="^GET")
    storage.write_bytes(f"{place}/large", content)
    assert storage.read_bytes(f"{place}/large") == content
    assert proxy.injected.total() == 3


def test_a_server_that_never_answers_is_said(through, place, monkeypatch):
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    through(rate=1.0, kinds=["slow_down"])
    with pytest.raises(VasError, match=r"cannot write here: .*SlowDown") as caught:
        storage.write_bytes(f"{place}/file", b"")
    assert caught.value.where == f"{place}/file"
    with pytest.raises(VasError, match="cannot read this file"):
        storage.read_bytes(f"{place}/file")
    with pytest.raises(VasError, match="cannot remove this file"):
        storage.delete(f"{place}/file")


def test_a_quarter_of_all_requests_may_fail(through, place, impatient):
    proxy = through(rate=0.25, seed=1, stall_s=0.2)
    for number in range(8):
        storage.write_table(f"{place}/{number}.parquet", TABLE)
    storage.write_table_stream(f"{place}/8.parquet", [TABLE], TABLE.schema, 100)
    files = storage.list_files(place)
    assert files == [f"{place}/{number}.parquet" for number in range(9)]
    for file in files:
        assert storage.read_table([file]).equals(TABLE)
    assert storage.read_rows(files[-1], 250, 270).equals(TABLE.slice(250, 20))
    for file in files:
        storage.delete(file)
    assert storage.list_files(place) == []
    assert proxy.injected.total() > 5


def test_a_lease_is_kept_and_returned_under_faults(through, place, monkeypatch):
    monkeypatch.setattr("vas.run.lease.RENEW_S", 0.1)
    monkeypatch.setattr("vas.run.lease._AGAIN_S", 0.05)
    proxy = through(rate=0.3, seed=2, stall_s=0.1)
    with lock.hold(place):
        renewals, deadline = 0, time.monotonic() + 60
        while renewals < 15 and time.monotonic() < deadline:
            content = storage.read_bytes(f"{place}/run.lock")
            assert Holder.read(content).pid == os.getpid()
            renewals = json.loads(content)["renewals"]
        assert renewals >= 15
    assert proxy.injected
    proxy.rate = 0.0
    assert storage.list_files(place) == []
