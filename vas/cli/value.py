"""`vas value`: look at value models, try them, publish them, distil them."""

from __future__ import annotations

from typing import Annotated

import typer

from vas.errors import VasError
from vas.progress import console

app = typer.Typer(help="Look at value models, try them, publish them, distil them.", no_args_is_help=True)

Target = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT|RUN", help="Folder or URI of a value model, or of a run that has one."),
]


@app.command("show", epilog="Example: `vas value show runs/demo`")
def value_show(checkpoint: Target) -> None:
    """Say what a value model is, and how good it is on held-out prompts."""
    from vas.cli.checkpoint import Checkpoint, show

    show(Checkpoint.open(checkpoint))


@app.command("score", epilog='Example: `vas value score runs/demo "Great, thanks!" --prompt "How was your day?"`')
def value_score(
    checkpoint: Target,
    text: Annotated[str, typer.Argument(help="What to score.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Score the text as a response to this; else it is a context of its own, as it stands."
        ),
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Score for this objective. Repeatable; default all.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="A table of numbers in place of colours.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON, for programs.")] = False,
) -> None:
    """Show what a value model expects after every token of a text.

    Values are in standard deviations of each reward, from its mean over the training rollouts.
    """
    from vas.cli.checkpoint import Checkpoint

    found = Checkpoint.open(checkpoint)
    names = found.chosen(objective or [])
    if found.config["head"]["kind"] == "vocab":
        raise VasError(
            "this value model has a vocab head: it ranks next tokens, but has no value of a text",
            found.location,
            "score with the value model that it was distilled from",
        )
    from vas.cli.score import score_text

    score_text(found, text, prompt, names, plain, json)


@app.command("push", epilog="Example: `vas value push runs/demo my-name/cheerful-value --private`")
def value_push(
    checkpoint: Target,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hugging Face hub: OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, if it is made now.")] = False,
) -> None:
    """Upload a value model to the Hugging Face hub, with its tokenizer and model card."""
    from vas.cli.checkpoint import Checkpoint

    found = Checkpoint.open(checkpoint)
    from vas.cli.push import push

    print(push(found, repo, private))


@app.command("distill", epilog="Example: `vas value distill runs/demo --epochs 20`")
def value_distill(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run with a trained value model.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="Folder under `value/` that takes the new one.")] = "vocab",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the rollouts. Default: what has served other models.")
    ] = None,
) -> None:
    """Distil a run's value model into one with a vocab head, which scores all next tokens in one pass."""
    from vas.run.distilling import distill_run

    location = distill_run(run, name, epochs)
    console.print(f"Its checkpoint: [bold]{location}[/bold]", highlight=False)
