"""`vas generate`: one prompt, streamed to the terminal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vas.decoding.sequence import GuidanceParams, Request, SamplingParams, Token
from vas.errors import VasError, nearest
from vas.progress import console
from vas.prompts import one_message
from vas.run.directory import RunDirectory

if TYPE_CHECKING:  # torch loads once everything that may be refused at once has been looked at
    from vas.decoding.engine import Engine
    from vas.models.base import BaseModel
    from vas.models.served import ServedModel


def generate_text(
    location: str,
    prompt: str,
    strengths: dict[str, float],
    samples: int,
    temperature: float | None,
    max_tokens: int | None,
    candidates: int | None,
    schedule: str | None,
    seed: int,
    plain: bool,
) -> None:
    """Answer `prompt` with a run's models; the run's config fills in what is None."""
    run = RunDirectory.open(location)
    _check_strengths(strengths, run)
    strengths = {name: strength for name, strength in strengths.items() if strength}  # 0 is no guidance
    chosen = {"temperature": temperature, "max_tokens": max_tokens}
    sampling = run.config.rollouts.sampling.model_copy(update={k: v for k, v in chosen.items() if v is not None})
    guiding = {"candidates": candidates, "schedule": schedule}
    evaluation = run.config.evaluation.model_copy(update={k: v for k, v in guiding.items() if v is not None})
    how, guidance = SamplingParams.of(sampling, seed), GuidanceParams.of(evaluation, strengths)
    if strengths and not run.done("train"):
        raise VasError("the run has no finished value model", run.location, f"vas run {run.location}")
    from vas.models.base import encode_prompt

    base, engine = load_engine(run, guided=bool(strengths))
    output = Console()
    asked = one_message(prompt, run.config.prompts.system)
    tokens = encode_prompt(base.tokenizer, asked)
    try:
        for i in range(samples):
            request = Request(
                f"sample {i}", tuple(tokens), replace(how, seed=seed + i), guidance, messages=asked.messages
            )
            kl, count, ended = 0.0, 0, None
            for token in engine.stream(request):
                kl, count, ended = kl + token.kl, count + 1, token.finish_reason
                text = "".join(c for c in token.text if c.isprintable() or c in "\n\t")  # no escapes to the terminal
                if plain or not output.is_terminal:
                    print(text, end="", flush=True)
                else:
                    output.print(_shaded(text, token), end="", highlight=False, soft_wrap=True)
            print(flush=True)
            length = f"cut at {count} tokens (--max-tokens)" if ended == "length" else f"{count} tokens"
            moved = f", {kl:.1f} nats from the base model" if strengths else ""
            console.print(f"seed {seed + i}: {length}{moved}", style="dim", highlight=False, soft_wrap=True)
        if strengths and output.is_terminal and not plain:
            console.print("[green]likelier[/green], [red]less likely[/red] by guidance; bold: by more than e times")
    finally:
        base.close()


def _check_strengths(strengths: dict[str, float], run: RunDirectory) -> None:
    """Raise VasError for a strength that no model could follow, before any model is loaded."""
    for name, strength in strengths.items():
        where = f"--strength {name}={strength:g}"
        if name not in run.config.rewards:
            raise VasError(f"the run has no objective '{name}'", where, nearest(name, list(run.config.rewards)))
        if not math.isfinite(strength):
            raise VasError(f"the strength of '{name}' is not a finite number", where, "give a number, e.g. 2")


def load_engine(run: RunDirectory, guided: bool) -> tuple[BaseModel | ServedModel, Engine]:
    """A run's base model, and an engine with its value model when one is needed."""
    from vas.decoding.engine import Engine
    from vas.decoding.loading import load_scorer
    from vas.models.base import quieten
    from vas.models.served import open_base

    quieten()
    base, linears = open_base(run.config.base), run.config.base.linears
    scorers = [load_scorer(run.config.value.name, run.value, base, linears)] if guided else []
    return base, Engine(base, scorers, linears=linears, free=True)


def _shaded(text: str, token: Token) -> Text:
    """Green where guidance made the token likelier, red where less likely."""
    shift = token.guided_logprob - token.logprob
    moved = abs(shift) >= 0.1  # of what a server has not told, nothing is known
    style = ("green" if shift > 0 else "red") + (" bold" if abs(shift) > 1 else "") if moved else ""
    return Text(text, style=style)
