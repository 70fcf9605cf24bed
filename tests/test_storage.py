"""Storage: atomic writes on disk, the same calls on a real S3 server, errors that name the place."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_tokenizer, tiny_value

from vas import config, s3, storage
from vas.errors import VasError
from vas.models.value import ValueModel
from vas.prompts import load_prompts

TABLE = pa.table({"id": [1, 2, 3], "text": ["fox", "dög", None], "tokens": [[1, 2], [], [3]]})


# --- locations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "remote"),
    [("runs", False), ("/data/runs", False), ("file:///data", False), ("s3://b/k", True), ("gs://b/k", True)],
)
def test_a_location_is_remote_or_not(location, remote):
    assert storage.is_remote(location) is remote


def test_locations_are_joined():
    assert storage.join("s3://bucket/runs/", "demo", "run.json") == "s3://bucket/runs/demo/run.json"


def test_a_location_is_made_absolute_unless_it_is_remote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/demo") == str(tmp_path / "runs" / "demo")
    assert storage.absolute("file:///data/runs") == "/data/runs"
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"


@pytest.mark.parametrize("location", ["s3://", "s3:///runs", "s3://bucket//runs/demo"])
def test_an_s3_location_with_nothing_where_a_name_belongs_is_refused(location):
    with pytest.raises(VasError, match="an S3 location has a bucket"):
        storage.kind_of(location)


def test_an_s3_endpoint_that_is_no_url_is_said(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    with pytest.raises(VasError, match=r"cannot use this S3 endpoint(.|\n)*AWS_ENDPOINT_URL=localhost:8333"):
        storage.kind_of("s3://bucket/runs")


def test_an_unknown_kind_of_uri_is_refused():
    with pytest.raises(VasError, match="cannot open this kind of URI") as caught:
        storage.read_bytes("nonsense://a/b")
    assert caught.value.where == "nonsense://a/b"


# --- on disk ------------------------------------------------------------------------------------


def test_bytes_come_back(tmp_path):
    file = str(tmp_path / "a" / "b" / "file.bin")
    storage.write_bytes(file, b"first")
    storage.write_bytes(file, b"second")
    assert storage.read_bytes(file) == b"second"
    assert storage.read_bytes(f"file://{file}") == b"second"
    assert storage.exists(file)
    assert storage.exists(str(tmp_path / "a"))
    assert not storage.exists(str(tmp_path / "c"))


def test_a_relative_location_is_below_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_tables_come_back_with_missing_values_and_columns(tmp_path):
    files = [str(tmp_path / name) for name in ("1.parquet", "2.parquet")]
    for file in files:
        storage.write_table(file, TABLE)
    assert storage.read_table(files).equals(pa.concat_tables([TABLE, TABLE]))
    assert storage.read_table(files[:1], columns=["text"]).equals(TABLE.select(["text"]))
    assert storage.read_table([], TABLE.schema).schema == TABLE.schema


def test_a_reader_never_sees_half_a_file(tmp_path):
    file = str(tmp_path / "file")
    whole = {bytes([number]) * 300_000 for number in range(3)}
    storage.write_bytes(file, bytes(300_000))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in whole:
                storage.write_bytes(file, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {storage.read_bytes(file) for _ in range(300)}
        listed = {name for _ in range(50) for name in storage.list_files(str(tmp_path))}
    finally:
        stop.set()
        writer.join()
    assert seen <= whole
    assert len(seen) > 1
    assert listed == {file}
    assert os.listdir(tmp_path) == ["file"]


def test_listing_is_sorted_and_hides_what_is_not_committed(tmp_path):
    for name in ("b.parquet", "a/c.parquet", "a/c.txt", ".b.parquet.123", "_SUCCESS", ".tmp/d.parquet", "_x/e.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert storage.list_files(str(tmp_path)) == [str(tmp_path / n) for n in ("a/c.parquet", "a/c.txt", "b.parquet")]
    assert storage.list_files(f"{tmp_path}/", ".parquet") == [str(tmp_path / n) for n in ("a/c.parquet", "b.parquet")]
    assert storage.list_files(str(tmp_path / "none")) == []


def test_a_hidden_folder_above_does_not_hide_files(tmp_path):
    storage.write_bytes(str(tmp_path / ".cache" / "file"), b"")
    assert storage.list_files(str(tmp_path / ".cache")) == [str(tmp_path / ".cache" / "file")]


def test_what_cannot_be_read_is_named(tmp_path):
    file = str(tmp_path / "none")
    with pytest.raises(VasError, match="cannot read this file: No such file") as caught:
        storage.read_bytes(file)
    assert caught.value.where == file
    storage.write_bytes(file, b"no Parquet")
    with pytest.raises(VasError, match="cannot read this Parquet file") as caught:
        storage.read_table([file])
    assert caught.value.where == file


def test_what_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    for location in (str(tmp_path / "file" / "below"), str(tmp_path / "folder")):
        with pytest.raises(VasError, match="cannot write here") as caught:
            storage.write_bytes(location, b"x")
        assert caught.value.where == location
    assert (tmp_path / "file").read_bytes() == b"kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_directory_is_copied_whole(tmp_path):
    for name in ("a", "b/c"):
        storage.write_bytes(str(tmp_path / "from" / name), name.encode())
    storage.copy_directory(str(tmp_path / "from"), str(tmp_path / "to"))
    assert storage.read_bytes(str(tmp_path / "to" / "b" / "c")) == b"b/c"
    assert len(storage.list_files(str(tmp_path / "to"))) == 2


def test_copying_what_is_not_there_names_the_source(tmp_path):
    with pytest.raises(VasError, match="there is no such directory") as caught:
        storage.copy_directory(str(tmp_path / "none"), str(tmp_path / "to"))
    assert caught.value.where == str(tmp_path / "none")
    assert not (tmp_path / "to").exists()


# --- conditions, streams, rows: the same on disk and on S3 -----------------------------------------


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    """An empty directory."""
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")


def test_of_many_that_create_a_file_one_does(place):
    contents = [str(number).encode() * 1000 for number in range(8)]
    start = threading.Barrier(len(contents))

    def create(content: bytes) -> str | None:
        start.wait()
        return storage.write_new(f"{place}/a/file", content)

    with ThreadPoolExecutor(len(contents)) as pool:
        created = list(pool.map(create, contents))
    (winner,) = (content for content, version in zip(contents, created, strict=True) if version is not None)
    assert storage.read_bytes(f"{place}/a/file") == winner
    assert storage.list_files(place, hidden=True) == [f"{place}/a/file"]


def test_what_is_removed_is_gone(place):
    storage.write_bytes(f"{place}/file", b"x")
    for _ in range(2):
        storage.delete(f"{place}/file")
        assert not storage.exists(f"{place}/file")
        assert storage.read_version(f"{place}/file") is None


def test_hidden_files_are_listed_when_asked_for(place):
    for name in ("a", "_b", ".c"):
        storage.write_bytes(f"{place}/{name}", b"")
    assert storage.list_files(place, hidden=True) == sorted(f"{place}/{name}" for name in ("a", "_b", ".c"))


def test_a_stream_of_tables_is_one_file_of_even_row_groups(place):
    file, numbers = f"{place}/rows.parquet", pa.table({"n": pa.array(range(23), pa.int32())})
    tables = [numbers.slice(0, 1), numbers.slice(1, 0), numbers.slice(1, 14), numbers.slice(15)]
    assert storage.write_table_stream(file, iter(tables), numbers.schema, 5) == 23
    assert storage.read_table([file]).equals(numbers)
    assert storage.count_rows(file) == 23
    fs, path = storage.filesystem(file)
    metadata = pq.read_metadata(path, filesystem=fs)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [5, 5, 5, 5, 3]
    for start, stop in [(0, 23), (0, 1), (4, 6), (5, 10), (7, 7), (20, 99), (22, 23), (23, 30), (9, 3)]:
        assert storage.read_rows(file, start, stop)["n"].to_pylist() == list(range(23))[start:stop]


def test_no_tables_are_a_file_without_rows(place):
    assert storage.write_table_stream(f"{place}/none.parquet", [], TABLE.schema, 5) == 0
    assert storage.read_table([f"{place}/none.parquet"]).equals(TABLE.schema.empty_table())
    assert len(storage.read_rows(f"{place}/none.parquet", 0, 3)) == 0


def test_a_stream_that_fails_leaves_nothing(place):
    def tables():
        yield TABLE
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        storage.write_table_stream(f"{place}/rows.parquet", tables(), TABLE.schema, 2)
    assert storage.list_files(place, hidden=True) == []


# --- S3 -----------------------------------------------------------------------------------------


def test_s3_bytes_tables_and_listing(bucket):
    storage.write_bytes(f"{bucket}/a/file", b"first")
    storage.write_bytes(f"{bucket}/a/file", b"second")
    storage.write_table(f"{bucket}/rows.parquet", TABLE)
    storage.write_bytes(f"{bucket}/.hidden", b"")
    assert storage.read_bytes(f"{bucket}/a/file") == b"second"
    assert storage.read_table([f"{bucket}/rows.parquet"]).equals(TABLE)
    assert storage.list_files(bucket) == [f"{bucket}/a/file", f"{bucket}/rows.parquet"]
    assert storage.list_files(bucket, ".parquet") == [f"{bucket}/rows.parquet"]
    assert storage.list_files(f"{bucket}/none") == []
    assert storage.exists(f"{bucket}/a/file")
    assert not storage.exists(f"{bucket}/b")


def test_s3_what_is_not_there_is_named(bucket):
    for location in (f"{bucket}/none", "s3://no-such-bucket/none"):
        with pytest.raises(VasError, match="cannot read this file") as caught:
            storage.read_bytes(location)
        assert caught.value.where == location
    with pytest.raises(VasError, match="there is no such directory"):
        storage.copy_directory(f"{bucket}/none", "unused")


def test_s3_prompts(bucket):
    rows = [{"prompt": f"What is in picture {number}?"} for number in range(20)]
    storage.write_bytes(f"{bucket}/more/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:10]).encode())
    storage.write_table(f"{bucket}/more/b.parquet", pa.Table.from_pylist(rows[10:]))
    prompts = load_prompts(config.Prompts(source=f"{bucket}/more"))
    assert [prompt.last_user_text() for prompt in prompts] == [row["prompt"] for row in rows]
    with pytest.raises(VasError, match="there are no prompts here"):
        load_prompts(config.Prompts(source=f"{bucket}/none"))


def test_s3_value_model(bucket):
    model = tiny_value(objectives=("positive", "concise"))
    model.save(f"{bucket}/value", tiny_tokenizer(), "# A card", [{"epoch": 1}])
    again = ValueModel.load(f"{bucket}/value")
    ids = torch.tensor([[5, 90, 41, 200, 33]])
    assert torch.equal(again(ids), model(ids))
    assert again.objectives == ("positive", "concise")
    assert again.config.objectives == model.config.objectives
    assert again.config.tokenizer_digest == model.config.tokenizer_digest
    assert json.loads(storage.read_bytes(f"{bucket}/value/training.json")) == [{"epoch": 1}]
    with pytest.raises(VasError) as caught:
        ValueModel.load(f"{bucket}/none")
    assert caught.value.where == f"{bucket}/none"


def test_s3_wrong_credentials_and_no_server_are_said(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for look in (storage.exists, storage.list_files, storage.kind_of):
        with pytest.raises(VasError, match=r"cannot look here(.|\n)*AWS_SECRET_ACCESS_KEY"):
            look("s3://test/key")
    with pytest.raises(VasError, match=r"cannot write here(.|\n)*check your credentials"):
        storage.write_bytes("s3://test/key", b"")
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens on `discard`
    with pytest.raises(VasError, match="cannot look here"):
        storage.exists("s3://test/key")
    with pytest.raises(VasError, match=r"cannot write here(.|\n)*127.0.0.1:9(.|\n)*check AWS_ENDPOINT_URL"):
        storage.write_bytes("s3://test/key", b"")


def test_s3_a_bucket_that_is_not_there_is_said(bucket):
    with pytest.raises(VasError, match=r"cannot read this file(.|\n)*s3://no-such-bucket/key(.|\n)*create it"):
        storage.read_version("s3://no-such-bucket/key")  # this server makes a bucket that is written to


def test_s3_a_large_file_goes_up_in_parts(bucket, monkeypatch):
    monkeypatch.setattr(s3, "_PART", 5 * 2**20)
    content = os.urandom(2**20) * 11
    storage.write_bytes(f"{bucket}/large", content)
    assert storage.read_bytes(f"{bucket}/large") == content


def test_s3_a_version_that_is_no_longer_there_is_not_replaced(bucket):
    file = f"{bucket}/file"
    first = storage.write_new(file, b"first")
    assert storage.read_version(file) == (b"first", first)
    second = storage.write_over(file, b"second", first)
    assert storage.write_over(file, b"third", first) is None
    assert storage.read_version(file) == (b"second", second)
    storage.delete(file)
    assert storage.write_over(file, b"fourth", second) is None
    assert storage.read_version(file) is None


@pytest.mark.parametrize("content", [b"", b"one", b"one\n\ntwo\r\nthree\rfour\n", "ü\u2028ü\n".encode()])
def test_lines_are_those_of_the_whole_file(place, content):
    storage.write_bytes(f"{place}/lines.txt", content)
    assert list(storage.read_lines(f"{place}/lines.txt")) == content.splitlines()


def test_lines_of_no_file(place):
    with pytest.raises(VasError, match="cannot read this file"):
        list(storage.read_lines(f"{place}/nothing.txt"))


def test_parts_are_the_row_groups(place):
    table = pa.table({"n": list(range(10))})
    storage.write_table_stream(f"{place}/parts.parquet", [table], table.schema, 4)
    parts = list(storage.read_parts(f"{place}/parts.parquet"))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert pa.concat_tables(parts).equals(table)
