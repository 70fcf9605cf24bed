"""`vas value score`: a value for every token of a text."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from vas import storage
from vas.cli.checkpoint import Checkpoint
from vas.decoding.detokenizer import Detokenizer
from vas.errors import VasError
from vas.models.base import encode_prompt, load_tokenizer, quieten
from vas.models.value import ValueModel
from vas.prompts import one_message
from vas.schema import Prompt

# as in the report: green above the mean, orange below
_HIGH, _MIDDLE, _LOW = (0, 140, 100), (238, 238, 238), (213, 94, 0)
_LEAST_SPAN = 0.5  # standard deviations: smaller differences stay pale
_PART = "…"  # a token that ends inside a character


def score_text(
    checkpoint: Checkpoint, text: str, prompt: str | None, objectives: list[str], plain: bool, as_json: bool
) -> None:
    """Print the value of every prefix of `text` that ends with a token of it, for each of `objectives`.

    With `prompt`, the text is the response to it, and the value before its first token is known too.
    Raises VasError for a text that is empty or longer than the model reads.
    """
    quieten()
    with storage.local_copy(checkpoint.location) as folder:
        model, tokenizer = ValueModel.load(folder), load_tokenizer(folder)
    if model.config.reads == "text":
        raise VasError(
            "this value model reads text in tokens of its own, after a prompt in the base model's form",
            checkpoint.location,
            "`vas generate` and an endpoint guide by it",
        )
    before = [] if prompt is None else encode_prompt(tokenizer, _chat(checkpoint, prompt))
    after = list(tokenizer(text, add_special_tokens=not before).input_ids)
    tokens = before + after
    _check_length(len(after), len(tokens), model)
    with torch.inference_mode():
        values_TJ = model(torch.tensor([tokens], device=model.device))[0].tolist()
    scores = []
    for name in objectives:
        about = next(each for each in checkpoint.config["objectives"] if each["name"] == name)
        every = [row[checkpoint.objectives.index(name)] for row in values_TJ]
        scores.append(_Score(about, every[len(before) - 1] if before else None, every[len(before) :]))
    pieces = _pieces(tokenizer, after)
    output = Console()
    if as_json:
        rows = [{"id": token, "text": piece} for token, piece in zip(after, pieces, strict=True)]
        content = {"tokens": rows, "objectives": {score.name: score.as_dict() for score in scores}}
        print(json.dumps(content, ensure_ascii=False, indent=2))
    elif plain or not output.is_terminal:
        _print_table(pieces, scores)
    else:
        for score in scores:
            output.print(_shaded(pieces, score), highlight=False, soft_wrap=True)


class _Score:
    """One objective's values, in standard deviations of its reward."""

    def __init__(self, about: dict[str, Any], start: float | None, values: list[float]) -> None:
        self.name, self.mean, self.std = about["name"], about["mean"], about["std"]
        self.start, self.values = start, values

    @property
    def reward(self) -> float:
        """The value after the last token, as the reward itself would be."""
        return self.mean + self.std * self.values[-1]

    @property
    def summary(self) -> str:
        start = "" if self.start is None else f"{self.start:+.2f} before the response, "
        between = f"lowest {min(self.values):+.2f}, highest {max(self.values):+.2f}"
        return (
            f"{start}{self.values[-1]:+.2f} at its end ({between}); "
            f"the end stands for a reward of {self.reward:.4g} (mean {self.mean:.4g}, std {self.std:.4g})"
        )

    def as_dict(self) -> dict[str, Any]:
        about = {"mean": self.mean, "std": self.std, "reward": self.reward}
        return about | ({} if self.start is None else {"start": self.start}) | {"values": self.values}


def _chat(checkpoint: Checkpoint, prompt: str) -> Prompt:
    """The prompt as a chat, with the system message of the run if one is at hand."""
    system = checkpoint.run.config.prompts.system if checkpoint.run is not None else None
    return one_message(prompt, system)


def _check_length(scored: int, all_: int, model: ValueModel) -> None:
    if not scored:
        raise VasError("there is nothing to score: the text is empty", mend="give it a token at least")
    room = model.config.context_length
    if room is not None and all_ > room:
        raise VasError(f"the text has {all_} tokens, the value model reads {room}", mend="score a shorter part of it")


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """Each token's share of the text; a character split among tokens is its last token's, the others' is empty."""
    special = set(tokenizer.all_special_ids)
    detokenizer = Detokenizer(tokenizer, ())  # a token's text depends on its neighbours
    pieces = [str(tokenizer.decode([t])) if t in special else detokenizer.push(t) for t in tokens]
    pieces[-1] += detokenizer.push(None)
    return pieces


def _print_table(pieces: list[str], scores: list[_Score]) -> None:
    """A line a token: its value for each objective, then its text in JSON's quotes."""
    widths = [max(6, len(score.name)) for score in scores]
    print(*(f"{score.name:>{width}}" for score, width in zip(scores, widths, strict=True)), "token", sep="  ")
    for i, piece in enumerate(pieces):
        numbers = (f"{score.values[i]:>+{width}.2f}" for score, width in zip(scores, widths, strict=True))
        print(*numbers, json.dumps(piece, ensure_ascii=False) if piece else _PART, sep="  ")
    for score in scores:
        print(f"{score.name}: {score.summary}")


def _shaded(pieces: list[str], score: _Score) -> Text:
    """A title, a legend, and the text with each token on the colour of its value."""
    span = max(_LEAST_SPAN, *map(abs, score.values))
    shown = Text(score.name, "bold").append(f"  {score.summary}\n", "not bold dim")
    shown.append(f"{-span:+.1f} ", "not bold")
    for step in range(-4, 5):
        shown.append("  ", _style(step / 4))
    shown.append(f" {span:+.1f} standard deviations of the reward\n\n", "not bold")
    for piece, value in zip(pieces, score.values, strict=True):
        text = "".join(c for c in piece if c.isprintable() or c in "\n\t")  # no escapes to the terminal
        shown.append(text, _style(value / span))
    return shown.append("\n")


def _style(share: float) -> Style:
    """Black on a colour between the lowest (-1), the mean (0) and the highest (1)."""
    end = _HIGH if share > 0 else _LOW
    red, green, blue = (m + abs(share) * (e - m) for m, e in zip(_MIDDLE, end, strict=True))
    return Style(color="black", bgcolor=Color.from_rgb(red, green, blue), bold=False)
