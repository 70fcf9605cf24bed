"""Prompt sets: every format, stable ids, a split that never leaks, errors that say where."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vas.config import Prompts
from vas.errors import VasError
from vas.prompts import load_prompts, prompts_from_table, prompts_to_table
from vas.schema import PROMPT_SCHEMA
from vas.storage import write_table

ASKED = [f"What is the story behind picture {number}?" for number in range(12)]


def chat(text):
    return [{"role": "user", "content": text}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source, **settings):
    return load_prompts(Prompts(source=str(source), **{"held_out": 0.5, **settings}))


def asked(prompts):
    return [prompt.last_user_text() for prompt in prompts]


@pytest.fixture
def filler():
    """Rows enough that neither side of the split is empty."""
    return [{"prompt": text} for text in ASKED]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "txt"])
def test_every_format_gives_the_same_prompts(tmp_path, filler, suffix):
    path = tmp_path / f"set.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(filler), path)
    elif suffix == "txt":
        path.write_text("\n\n".join(ASKED) + "\r\n  \n")
    else:
        write_lines(path, filler)
    prompts = load(path)
    assert asked(prompts) == ASKED
    assert all(prompt.messages == tuple(chat(prompt.last_user_text())) for prompt in prompts)
    assert prompts == load(write_lines(tmp_path / "reference.jsonl", filler))


def test_a_directory_is_its_prompt_files_in_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", [{"question": text} for text in ASKED[4:8]])
    (tmp_path / "a.txt").write_text("\n".join(ASKED[:4]))
    (tmp_path / "deeper").mkdir()
    pq.write_table(pa.table({"prompt": ASKED[8:]}), tmp_path / "deeper" / "c.parquet")
    (tmp_path / "README.md").write_text("no prompts here")
    (tmp_path / ".hidden.txt").write_text("nor here")
    assert asked(load(tmp_path)) == ASKED
    assert load(f"{tmp_path}/") == load(tmp_path) == load(f"file://{tmp_path}")


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "set.txt"
    path.write_text("\n".join(ASKED), encoding="utf-8-sig")
    assert asked(load(path)) == ASKED


def test_a_chat_keeps_its_turns_and_only_role_and_content(tmp_path, filler):
    turns = [
        {"role": "user", "content": "Tea?", "name": "Ann"},
        {"role": "assistant", "content": "Gladly."},
        {"role": "user", "content": "Sugar?"},
    ]
    first = load(write_lines(tmp_path / "set.jsonl", [{"messages": turns}, *filler]))[0]
    assert first.messages == tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    assert first.last_user_text() == "Sugar?"


def test_only_the_column_text_is_a_plain_string(tmp_path, filler):
    rows = [{"text": "Once upon a time"}, *filler]
    plain = load(write_lines(tmp_path / "set.jsonl", rows), system="Be brief.")[0]
    assert (plain.text, plain.messages) == ("Once upon a time", ())
    named = load(write_lines(tmp_path / "named.jsonl", [{"title": text} for text in ASKED]), field="title")
    assert named[0].messages == tuple(chat(ASKED[0]))


def test_which_column_is_the_prompt(tmp_path, filler):
    row = {"text": "four", "question": "three", "prompt": "two", "messages": chat("one")}
    for field, expected in [(None, "one"), ("prompt", "two"), ("question", "three"), ("text", "four")]:
        rows = [row, *({field or "prompt": text} for text in ASKED)]
        assert asked(load(write_lines(tmp_path / "set.jsonl", rows), field=field))[0] == expected
    nothing = {"messages": None, "prompt": "", "question": "three"}
    assert asked(load(write_lines(tmp_path / "set.jsonl", [nothing, *filler])))[0] == "three"


def test_the_system_message_goes_before_chats_that_bring_none(tmp_path, filler):
    own = [{"role": "system", "content": "Be long."}, *chat("And now?")]
    path = write_lines(tmp_path / "set.jsonl", [{"prompt": own}, *filler])
    prompts = load(path, system="Be brief.")
    assert prompts[0].messages == tuple(own)
    assert prompts[1].messages == ({"role": "system", "content": "Be brief."}, *chat(ASKED[0]))
    assert [prompt.prompt_id for prompt in prompts] == [prompt.prompt_id for prompt in load(path)]


def test_ids_are_of_what_is_asked_and_nothing_else(tmp_path, filler):
    def prompt_id(row):
        return load(write_lines(tmp_path / "set.jsonl", [*filler, row]))[-1].prompt_id

    # This very digest, for ever: rollouts are filed under it.
    assert prompt_id({"prompt": "Hi"}) == prompt_id({"messages": chat("Hi")}) == "b03cbbe7211f66c1"
    assert prompt_id({"question": "Hi", "source": "elsewhere"}) == "b03cbbe7211f66c1"
    assert len({prompt_id(row) for row in [{"prompt": "Hi"}, {"text": "Hi"}, {"prompt": "Hé"}]}) == 3


def test_a_row_may_bring_its_id(tmp_path, filler):
    rows = [
        {"prompt": "a", "prompt_id": "mine"},
        {"prompt": "b", "prompt_id": 7},
        {"prompt": "c", "prompt_id": None},
    ]
    prompts = load(write_lines(tmp_path / "set.jsonl", [*rows, *filler]))
    assert [prompt.prompt_id for prompt in prompts[:2]] == ["mine", "7"]
    assert len(prompts[2].prompt_id) == 16


def test_repeats_are_left_out_and_counted(tmp_path, filler, caplog):
    path = write_lines(tmp_path / "set.jsonl", [*filler, filler[3], {"messages": chat(ASKED[0])}])
    with caplog.at_level(logging.WARNING):
        assert asked(load(path)) == ASKED
    assert "left out 2 rows" in caplog.text


def test_one_id_for_two_prompts_is_refused(tmp_path):
    path = write_lines(tmp_path / "set.jsonl", [{"prompt": text, "prompt_id": "same"} for text in ("a", "b")])
    with pytest.raises(VasError) as caught:
        load(path)
    assert "'same'" in str(caught.value)
    assert f"{path}:2" in str(caught.value)
    assert f"{path}:1" in str(caught.value)


def test_the_split_has_its_share_and_never_moves(tmp_path):
    rows = [{"prompt": f"Say the number {number} aloud."} for number in range(4000)]
    whole = load(write_lines(tmp_path / "whole.jsonl", rows), held_out=0.2)
    assert sum(prompt.held_out for prompt in whole) / 4000 == pytest.approx(0.2, abs=0.025)
    part = load(write_lines(tmp_path / "part.jsonl", rows[::-7]), held_out=0.2, system="Be brief.")
    side = {prompt.prompt_id: prompt.held_out for prompt in whole}
    assert all(side[prompt.prompt_id] == prompt.held_out for prompt in part)
    larger = load(tmp_path / "whole.jsonl", held_out=0.4)
    assert all(new.held_out for old, new in zip(whole, larger, strict=True) if old.held_out)


def test_limit_takes_the_first_different_prompts(tmp_path, filler):
    path = write_lines(tmp_path / "set.jsonl", [filler[0], *filler])
    assert asked(load(path, limit=10)) == ASKED[:10]
    assert asked(load(path, limit=100)) == ASKED


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "a"', "it is not JSON: Expecting ',' delimiter at column 15"),
        ('["a"]', "not an object"),
        (b'{"prompt": "\xff"}', "can't decode byte 0xff"),
        ('{"title": "a", "body": "b"}', "title, body"),
        ("{}", "the row's columns: none"),
        ('{"prompt": null}', "the row's columns: prompt"),
        ('{"prompt": "  "}', "'prompt': it is empty"),
        ('{"text": ""}', "'text': it is empty"),
        ('{"messages": []}', "'messages': it is empty"),
        ('{"prompt": 7}', "neither text nor a list but 7"),
        ('{"messages": ["a"]}', "message 1 has no role out of system, user, assistant"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 has no text"),
        ('{"messages": [{"role": "user", "content": " "}]}', "message 1 has no text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message must be the user's"),
        ('{"prompt": "a", "prompt_id": [1]}', "prompt_id must be text or a whole number, not [1]"),
        ('{"prompt": "\\ud800", "prompt_id": "x"}', "surrogates not allowed"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, filler, line, what):
    path = tmp_path / "set.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in filler[:2]).encode()
    path.write_bytes(good + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(VasError) as caught:
        load(path)
    assert f"{path}:4" in caught.value.where
    assert what in str(caught.value)


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 1500 + [""]}), path)
    with pytest.raises(VasError, match="it is empty") as caught:
        load(path)
    assert caught.value.where == f"{path}, row 1501"


def test_a_field_that_is_not_there_is_answered_with_those_that_are(tmp_path, filler):
    path = write_lines(tmp_path / "set.jsonl", filler)
    with pytest.raises(VasError, match="nothing in 'instruction'") as caught:
        load(path, field="instruction")
    assert "columns: prompt" in str(caught.value)


def test_sources_that_hold_no_prompts(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "set.csv").write_text("prompt\na\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "folder").mkdir()
    for name, what in {
        "missing.jsonl": "there are no prompts here",
        "empty.jsonl": "the prompt set is empty",
        "set.csv": ".jsonl, .json, .parquet, .txt",
        "folder": "no prompt file is here",
        "broken.parquet": "cannot read this Parquet file",
    }.items():
        with pytest.raises(VasError) as caught:
            load(tmp_path / name)
        assert what in str(caught.value)
        assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize(("held_out", "side"), [(0.001, "evaluation"), (0.999, "training")])
def test_a_split_with_an_empty_side_is_refused(tmp_path, filler, held_out, side):
    path = write_lines(tmp_path / "set.jsonl", filler)
    with pytest.raises(VasError, match=f"no prompts for {side}"):
        load(path, held_out=held_out)


def test_a_bundled_name_is_known_or_the_nearest_is_told():
    with pytest.raises(VasError, match="did you mean 'demo'"):
        load("bundled:demos")
    with pytest.raises(VasError, match="known: demo"):
        load("bundled:xyz")


def test_the_bundled_prompts():
    prompts = load_prompts(Prompts(source="bundled:demo"))
    texts = asked(prompts)
    assert len(texts) >= 400
    assert len({text.lower().strip(" .?!") for text in texts}) == len(texts)
    assert all(3 < len(text.split()) < 15 for text in texts)
    assert 0.15 < sum(prompt.held_out for prompt in prompts) / len(prompts) < 0.25


def test_a_table_brings_the_prompts_back(tmp_path, filler):
    rows = [
        {"text": "Once upon a time"},
        {"messages": [*chat("Tea?"), {"role": "assistant", "content": "Yes."}, *chat("How?")]},
    ]
    prompts = load(write_lines(tmp_path / "set.jsonl", [*rows, *filler]), system="Be brief.")
    table = prompts_to_table(prompts)
    assert table.schema == PROMPT_SCHEMA
    write_table(str(tmp_path / "prompts" / "part.parquet"), table)
    assert prompts_from_table(pq.read_table(tmp_path / "prompts" / "part.parquet")) == prompts
    assert load(tmp_path / "prompts") == prompts  # what a run kept is a prompt set itself
    assert prompts_from_table(prompts_to_table([])) == []
