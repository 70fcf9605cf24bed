"""`vas value`: what it says of a checkpoint, values of a text, uploads to a hub, and what it refuses."""

import base64
import contextlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import message, python, tiny_run, vas
from tiny import tiny_tokenizer, tiny_value

from vas import storage
from vas.cli.checkpoint import Checkpoint, show
from vas.cli.score import score_text
from vas.errors import VasError
from vas.models.base import encode_prompt
from vas.models.value import ValueModel
from vas.schema import Prompt

HISTORY = [
    {
        "epoch": 1,
        "losses": [1.0],
        "held_out": {"positive": {"explained_variance": 0.251, "by_quarter": [0.1, 0.2, 0.3, 0.4]}},
    },
    {
        "epoch": 2,
        "losses": [0.9],
        "held_out": {"positive": {"explained_variance": 0.125, "by_quarter": [0.0, 0.1, 0.2, 0.3]}},
    },
]
SYSTEM = "Be a fox."
ODD = "the fox — 日本 🦊!"  # the tokenizer knows bytes: three of them make 日, four the fox


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that looks trained; its value model kept the first epoch of two."""
    run = tiny_run(tmp_path_factory.mktemp("value"), prompts={"source": "bundled:demo", "system": SYSTEM})
    Path(run.value, "training.json").write_text(json.dumps(HISTORY))
    return run


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> str:
    """A checkpoint with a vocab head."""
    folder = str(tmp_path_factory.mktemp("vocab"))
    tiny_value(objectives=("positive",), head="vocab").save(folder, tiny_tokenizer(), "# A random value model")
    return folder


# --- vas value show -----------------------------------------------------------------------------


def test_show_says_what_a_checkpoint_is(run):
    found = vas("value", "show", run.location)
    assert found.returncode == 0, found.stderr
    model = ValueModel.load(run.value)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    heads = sum(p.numel() for p in model.heads.parameters()) + sum(b.numel() for b in model.heads.buffers())
    assert re.search(r"base model +tiny-llama", found.stdout)
    assert re.search(rf"backbone +llama, 2 layers, {backbone / 1000:.3g}k parameters", found.stdout)
    assert re.search(rf"head +categorical, 11 bins, hl_gauss, {heads} parameters", found.stdout)
    assert re.search(r"target +TD\(λ\), λ = 1", found.stdout)
    rows = [re.split(r"  +", line.strip()) for line in found.stdout.splitlines()]
    assert ["positive", "1", "0.5", "2", "0.251", "0.10 / 0.20 / 0.30 / 0.40"] in rows
    assert ["concise", "1", "0.5", "2", "–", "–"] in rows


def test_show_needs_no_torch(run):
    code = (
        "import sys; from vas.cli.main import main\ntry: main()\n"
        "finally: print(*sys.modules.keys() & {'torch', 'transformers', 'ray'}, file=sys.stderr)"
    )
    found = python("-c", code, "value", "show", run.value)
    assert (found.returncode, found.stderr.strip()) == (0, "")
    assert found.stdout.startswith(run.value)


def test_show_knows_vocab_heads_and_checkpoints_without_a_history(vocab, capsys):
    show(Checkpoint.open(vocab))
    shown = capsys.readouterr().out
    assert re.search(r"head +vocab, [\d.]+k parameters", shown)
    assert re.search(r"epochs +–", shown)
    distilled = [{"held_out": {}, "unseen": {"positive": {"explained": share}}} for share in (0.1, 0.7, 0.4)]
    Path(vocab, "training.json").write_text(json.dumps(distilled))
    show(Checkpoint.open(vocab))
    assert re.search(r"positive +1 +0.5 +2 +0.700 +–", capsys.readouterr().out)


def test_a_checkpoint_is_found_on_s3(run, vocab, bucket, capsys):
    storage.copy_directory(run.value, f"{bucket}/value/default")
    found = Checkpoint.open(f"{bucket}/value/default")
    assert found.parameters() == Checkpoint.open(run.value).parameters()
    score_text(found, "the fox", None, ["positive"], plain=True, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["objectives"]["positive"]["values"]) == len(ids("the fox"))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "there is no value model here"),
        ("base", "this is no value model, but a model of type 'llama'"),
        ("unfinished", "the run has no finished value model"),
        ("damaged", "this file is damaged"),
        ("cut", "cannot read these weights"),
    ],
)
def test_what_is_no_checkpoint_is_said(run, tmp_path, place, says):
    if place == "base":
        target = str(Path(run.location).parents[1] / "base")
    elif place == "unfinished":
        target = tiny_run(tmp_path).location
        shutil.rmtree(Path(target, "value"))
    else:
        target = str(tmp_path / place)
        if place != "nowhere":
            shutil.copytree(run.value, target)
        if place == "damaged":
            Path(target, "config.json").write_text('{"model_type": ')
        if place == "cut":
            Path(target, "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with pytest.raises(VasError, match=says) as caught:
        show(Checkpoint.open(target))
    assert target in str(caught.value)


def test_errors_of_the_commands_are_readable(run, vocab, tmp_path):
    for words, says in [
        (("show", tmp_path), "there is no value model here (no config.json)"),
        (("score", run.location, "x", "--objective", "positve"), "did you mean 'positive'?"),
        (("score", vocab, "x"), "it ranks next tokens, but has no value of a text"),
        (("distill", tmp_path), "there is no run here (no run.json)"),
    ]:
        found = vas("value", *words)
        assert found.returncode == 2, found.stderr
        assert says in message(found.stderr)
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize("command", ["show", "score", "push", "distill"])
def test_help_shows_an_example(command):
    found = vas("value", command, "--help")
    assert f"Example: vas value {command}" in found.stdout


# --- vas value score ----------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text).input_ids)


def scored(run, capsys, text: str, prompt: str | None = None, objectives: tuple[str, ...] = ("positive",)) -> Any:
    """What `vas value score --json` prints."""
    score_text(Checkpoint.open(run.location), text, prompt, list(objectives), plain=False, as_json=True)
    return json.loads(capsys.readouterr().out)


def values(run, tokens: list[int], objective: int) -> list[float]:
    return ValueModel.load(run.value)(torch.tensor([tokens]))[0, :, objective].tolist()


def test_a_text_alone_is_the_context(run, capsys):
    found = scored(run, capsys, "the quick fox", objectives=("concise", "positive"))
    assert [token["id"] for token in found["tokens"]] == ids("the quick fox")
    assert "".join(token["text"] for token in found["tokens"]) == "the quick fox"
    assert list(found["objectives"]) == ["concise", "positive"]
    for number, name in enumerate(("positive", "concise")):
        expected, score = values(run, ids("the quick fox"), number), found["objectives"][name]
        assert score["values"] == pytest.approx(expected, abs=1e-5)
        assert score["reward"] == pytest.approx(0.5 + 2.0 * expected[-1], abs=1e-4)
        assert "start" not in score


def test_a_response_is_scored_behind_its_prompt(run, capsys):
    """The prompt goes through the chat template, with the run's system message."""
    found = scored(run, capsys, "a fox", prompt="Who?")["objectives"]["positive"]
    chat = Prompt("", ({"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who?"}))
    before = encode_prompt(tiny_tokenizer(), chat)
    expected = values(run, before + ids("a fox"), 0)
    assert [found["start"], *found["values"]] == pytest.approx(expected[len(before) - 1 :], abs=1e-5)


def test_characters_of_many_tokens_stay_whole(run, capsys):
    tokens = scored(run, capsys, ODD)["tokens"]
    assert "".join(token["text"] for token in tokens) == ODD
    assert len(tokens) > len(ODD)
    marked = scored(run, capsys, "<|user|>fox<|end|>")["tokens"]
    assert [marked[0]["text"], marked[-1]["text"]] == ["<|user|>", "<|end|>"]


def test_a_table_has_a_line_a_token(run, capsys):
    score_text(Checkpoint.open(run.location), "日 fox", None, ["positive", "concise"], plain=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["positive", "concise", "token"]
    rows = lines[1:-2]
    assert len(rows) == len(ids("日 fox"))
    assert [row.split()[2] for row in rows[:3]] == ["…", "…", '"日"']
    expected = values(run, ids("日 fox"), 0)
    assert [float(row.split()[0]) for row in rows] == pytest.approx(expected, abs=0.006)
    assert lines[-2].startswith("positive: ")
    assert f"reward of {0.5 + 2 * expected[-1]:.4g}"[:12] in lines[-2]


def test_a_terminal_gets_colours_and_no_escapes_of_the_texts(run, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    score_text(Checkpoint.open(run.location), f"{ODD}\x1b[2J", None, ["positive"], plain=False, as_json=False)
    output = capsys.readouterr().out
    assert "\x1b[2J" not in output
    plain = re.sub(r"\x1b\[[\d;]*m", "", output)
    assert f"{ODD}[2J" in plain
    expected = values(run, ids(f"{ODD}\x1b[2J"), 0)
    assert f"lowest {min(expected):+.2f}, highest {max(expected):+.2f}" in plain
    colours = set(re.findall(r"48;2;(\d+);(\d+);(\d+)", output))
    assert len(colours) > 9  # more than the legend's


@pytest.mark.parametrize(("text", "says"), [("", "the text is empty"), ("fox " * 2000, "the value model reads 1024")])
def test_what_cannot_be_scored_is_said(run, text, says):
    with pytest.raises(VasError, match=says):
        score_text(Checkpoint.open(run.location), text, None, ["positive"], plain=True, as_json=False)


# --- vas value push -----------------------------------------------------------------------------


@contextlib.contextmanager
def hub() -> Iterator[SimpleNamespace]:
    """A server that speaks as much of the hub's protocol as an upload of small files needs."""
    seen = SimpleNamespace(created=None, token=None, files={})

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.token = self.headers["Authorization"]
            url = f"http://127.0.0.1:{self.server.server_port}"
            if "denied" in body.decode():
                return self.answer(403, {"error": "this token may not write"})
            if self.path == "/api/repos/create":
                seen.created = json.loads(body)
                return self.answer(200, {"url": f"{url}/{seen.created['organization']}/{seen.created['name']}"})
            if "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                each = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                return self.answer(200, {"files": each})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        seen.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer(200, {"commitUrl": f"{url}/me/cheerful/commit/1", "commitOid": "1", "success": True})
            return self.answer(200, {})

        def answer(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            """Nothing on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(seen=seen, url=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_push_uploads_the_whole_checkpoint(run):
    with hub() as place:
        environment = {"HF_ENDPOINT": place.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
        found = vas("value", "push", run.location, "me/cheerful", "--private", **environment)
        refused = vas("value", "push", run.location, "me/denied", **environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"{place.url}/me/cheerful"
    assert place.seen.token == "Bearer hf_test"
    assert (place.seen.created["organization"], place.seen.created["name"]) == ("me", "cheerful")
    assert place.seen.created["visibility"] == "private"
    assert place.seen.files == {path.name: path.read_bytes() for path in Path(run.value).iterdir()}
    assert refused.returncode == 2
    assert "this token may not write" in message(refused.stderr)


@pytest.mark.parametrize(
    ("environment", "repo", "says"),
    [
        ({"HF_TOKEN": ""}, "me/x", "there is no Hugging Face token"),
        ({"HF_TOKEN": "hf_test", "HF_ENDPOINT": "http://127.0.0.1:9"}, "me/x", "Connection refused"),
        ({"HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "1"}, "me/x", "offline mode is enabled"),
        ({"HF_TOKEN": "hf_test", "HF_ENDPOINT": "http://127.0.0.1:9"}, "a/b/c", "a/b/c"),
    ],
)
def test_push_says_why_it_cannot(run, tmp_path, environment, repo, says):
    found = vas(
        "value", "push", run.location, repo, **({"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)} | environment)
    )
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    text = message(found.stderr)
    assert says in text
    assert f"where: {repo}" in text
    assert "mend: " in text


def test_push_refuses_what_is_no_value_model(run):
    found = vas("value", "push", Path(run.location).parents[1] / "base", "me/x", HF_TOKEN="hf_test")
    assert found.returncode == 2
    assert "this is no value model" in message(found.stderr)
