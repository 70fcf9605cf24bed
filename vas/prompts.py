"""Prompt sets: every file that holds prompts becomes the same rows, with stable ids and a stable split."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib import resources
from itertools import islice
from typing import Any, overload

import pyarrow as pa
import pyarrow.fs as pafs

from vas import storage
from vas.config import Prompts
from vas.digests import digest
from vas.errors import VasError, nearest
from vas.schema import PROMPT_SCHEMA, Message, Prompt

_COLUMNS = ("messages", "prompt", "question", "text")
_ROLES = ("system", "user", "assistant")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
STORED_TOGETHER = 1024  # prompts in a part of a Parquet file that is read at once
_BUNDLED = {"demo": "demo_prompts.jsonl"}


def load_prompts(config: Prompts) -> list[Prompt]:
    """All of `stream_prompts`."""
    return list(stream_prompts(config))


def stream_prompts(config: Prompts) -> Iterator[Prompt]:
    """The prompts that `config.source` names, in the order of its files and rows; only their ids are kept in memory.

    A source is a .jsonl/.json (an object a line), .parquet or .txt file (a user message a line),
    a directory of such files, or `bundled:NAME`. A row's prompt is its column `config.field`, else
    the first of `messages`, `prompt`, `question` and `text` that holds something: a chat, or a
    string, which is a user message except in `text`, where it is a plain string to be continued
    as it is. `config.system` goes before chats that bring no system message. Rows that repeat a
    prompt are left out, and the log says how many.

    Raises VasError for a source that cannot be read, a malformed row (by file and line), two
    different prompts with one prompt_id, and, at the end, no prompts at all or a split with an empty side.
    """
    contents: dict[str, str] = {}  # prompt_id → identity of what is asked
    repeats = held_out = 0
    for row, where in _rows(config.source):
        prompt, identity = _prompt(row, config, where)
        if prompt.prompt_id in contents:
            if contents[prompt.prompt_id] != identity:
                raise _two_prompts(config, prompt.prompt_id, where)
            repeats += 1
            continue
        contents[prompt.prompt_id] = identity
        held_out += prompt.held_out
        yield prompt
        if len(contents) == config.limit:
            break
    if repeats:
        log = logging.getLogger(__name__)
        log.warning("%s: left out %d rows that repeat an earlier prompt", config.source, repeats)
    if not contents:
        raise VasError("the prompt set is empty", config.source, "put at least two prompts in it")
    if held_out in (0, len(contents)):
        side = "training" if held_out else "evaluation"
        raise VasError(
            f"the split leaves no prompts for {side} (prompts: {len(contents)}, held_out: {config.held_out})",
            config.source,
            "use more prompts (prompts.limit), or change prompts.held_out",
        )


def _two_prompts(config: Prompts, prompt_id: str, where: str) -> VasError:
    """The error of an id that is given twice, to different prompts."""
    earlier = next(at for row, at in _rows(config.source) if _prompt(row, config, at)[0].prompt_id == prompt_id)
    return VasError(
        f"two different prompts have the prompt_id '{prompt_id}'",
        f"{where}, and before it {earlier}",
        "give each prompt its own prompt_id, or leave the column out",
    )


class StoredPrompts(Sequence[Prompt]):
    """The prompts of a Parquet file that `prompts_to_table` describes, read as they are asked for."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._count = storage.count_rows(location)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return prompts_from_table(storage.read_rows(self._location, start, max(start, stop)))[::step]
        return self[range(self._count)[index] : range(self._count)[index] + 1][0]

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, self._count, STORED_TOGETHER):
            yield from self[start : start + STORED_TOGETHER]


def store_prompts(location: str, prompts: Iterable[Prompt]) -> StoredPrompts:
    """Write prompts to one Parquet file, a part at a time; whatever the iterable raises leaves none."""
    parts = iter(prompts)
    tables = iter(lambda: prompts_to_table(list(islice(parts, STORED_TOGETHER))), prompts_to_table([]))
    storage.write_table_stream(location, tables, PROMPT_SCHEMA, STORED_TOGETHER)
    return StoredPrompts(location)


def prompts_to_table(prompts: list[Prompt]) -> pa.Table:
    """Prompts as rows of PROMPT_SCHEMA. Such a file is itself a prompt source, with the same ids."""
    return pa.Table.from_pylist([asdict(prompt) for prompt in prompts], schema=PROMPT_SCHEMA)


def prompts_from_table(table: pa.Table) -> list[Prompt]:
    """The inverse of `prompts_to_table`."""
    return [Prompt.from_row(row) for row in table.select(PROMPT_SCHEMA.names).to_pylist()]


def _rows(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row of a source and where it stands; a file is opened only when it is reached."""
    for location in _files(source):
        kind = location.rpartition(".")[2].lower()
        if kind == "parquet":
            parts = (part for group in storage.read_parts(location) for part in group.to_batches(STORED_TOGETHER))
            rows = (row for part in parts for row in part.to_pylist())
            yield from ((row, f"{location}, row {number}") for number, row in enumerate(rows, start=1))
            continue
        for number, line in enumerate(storage.read_lines(location), start=1):
            if line.strip():
                where = f"{location}:{number}"
                yield _line(line, kind == "txt", where), where


def _files(source: str) -> list[str]:
    """The prompt files of a source; a directory's are sorted by name."""
    if source.startswith("bundled:"):
        name = source.removeprefix("bundled:")
        if name not in _BUNDLED:
            raise VasError(f"no prompt set '{name}' is bundled", source, nearest(name, list(_BUNDLED)))
        return [str(resources.files("vas").joinpath("data", _BUNDLED[name]))]
    source = source.rstrip("/") or "/"  # S3 knows no object with a slash at its end
    fs, path = storage.filesystem(source)
    try:
        kind = fs.get_file_info(path).type
    except (OSError, pa.ArrowException) as error:
        raise VasError(f"cannot look for prompts: {error}", source, "check the URI and its rights") from None
    if kind == pafs.FileType.NotFound:
        raise VasError("there are no prompts here", source, "check the path, or try bundled:demo")
    locations = storage.list_files(source) if kind == pafs.FileType.Directory else [source]
    locations = [location for location in locations if location.lower().endswith(_SUFFIXES)]
    if not locations:
        raise VasError("no prompt file is here", source, f"known kinds: {', '.join(_SUFFIXES)}")
    return locations


def _line(line: bytes, plain: bool, where: str) -> dict[str, Any]:
    """A line of a .txt (`plain`) or JSON-lines file as a row."""
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        row = {"prompt": text.strip()} if plain else json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("it is JSON, but not an object")
    except ValueError as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"it is not JSON: {error.msg} at column {error.colno}"
        raise VasError(f"bad line: {reason}", where, "write UTF-8 text, one JSON object a line") from None
    return row


def _prompt(row: dict[str, Any], config: Prompts, where: str) -> tuple[Prompt, str]:
    """A row as a Prompt, with its id and its side of the split; and the identity of what is asked."""
    columns = [name for name in ([config.field] if config.field else _COLUMNS) if row.get(name) is not None]
    if not columns:
        wanted = config.field or "', '".join(_COLUMNS)
        there = f"the row's columns: {', '.join(row) or 'none'}"
        raise VasError(f"the row has nothing in '{wanted}'", where, f"set prompts.field; {there}")
    column = next((name for name in columns if row[name]), columns[0])
    try:
        messages, text = _content(row[column], column)
        # The id names what is asked, whatever system message a run puts before it.
        identity = digest(json.dumps(messages or text, sort_keys=True, ensure_ascii=False))
        prompt_id = _own_id(row) or identity
        # A hash of the id alone: a prompt keeps its side whatever else is in the set.
        held_out = int(digest("split", prompt_id), 16) / 16**16 < config.held_out
    except ValueError as error:  # UnicodeEncodeError is one: half a surrogate pair is no text
        mend = "a prompt is a text or a list of {role, content}; prompts.field picks its column"
        raise VasError(f"bad prompt in '{column}': {error}", where, mend) from None
    if config.system and messages and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": config.system}, *messages]
    return Prompt(prompt_id, tuple(messages), text, held_out), identity


def _content(content: Any, column: str) -> tuple[list[Message], str]:
    """A prompt as the messages of a chat, or else a plain string. Raises ValueError if it is neither."""
    if isinstance(content, str) and column == "text" and content.strip():
        return [], content
    chat = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if not isinstance(chat, list) or not chat:
        raise ValueError("it is empty" if chat == [] else f"it is neither text nor a list but {chat!r}")
    for number, message in enumerate(chat, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"message {number} has no role out of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError("it is empty" if isinstance(content, str) else f"message {number} has no text")
    if chat[-1]["role"] != "user":
        raise ValueError("the last message must be the user's")
    return [{"role": message["role"], "content": message["content"]} for message in chat], ""


def _own_id(row: dict[str, Any]) -> str:
    """The prompt_id that a row brings; empty if it brings none."""
    own = row.get("prompt_id", "")
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int)):
        raise ValueError(f"its prompt_id must be text or a whole number, not {own!r}")
    return "" if own is None else str(own)


def one_message(text: str, system: str | None) -> Prompt:
    """A chat of one message, after a system message if there is one."""
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    return Prompt("", (*before, {"role": "user", "content": text}))
