"""`vas`: entry point and commands. Errors are one readable block; a user's mistake exits with 2."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.panel import Panel

from vas.choices import Stage
from vas.cli.value import app as value_app
from vas.config import load_config
from vas.errors import VasError, as_vas_error
from vas.progress import console

if TYPE_CHECKING:
    from vas.run.directory import RunDirectory

app = typer.Typer(
    name="vas",
    help="Align a frozen language model at decoding time (Value Augmented Sampling).",
    epilog='Start with `vas run configs/demo.yaml`, then `vas generate runs/demo "How was your day?" -s positive=5`.',
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Look at a config before running it.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(value_app, name="value")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(metadata.version("vas"))
        raise typer.Exit


@app.callback()
def _vas(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_INTERRUPTED = 130  # typer's exit code after Ctrl-C

Target = Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="A config file, or the directory of a run.")]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A config file; configs/ has examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. `--set train.lr=1e-4`. Repeatable."),
]


@app.command(epilog="Example: `vas run configs/demo.yaml --set name=mine --set train.epochs=3`")
def run(target: Target, set_: Overrides = None) -> None:
    """Run all stages: prompts, rollouts, training, evaluation.

    Finished stages are skipped and an interrupted one goes on, so the same command resumes a run.
    """
    from vas.run.stages import run_all

    run = _open(target, set_)
    console.print(f"[bold]{run.config.name}[/bold] in {run.location}", highlight=False)
    run_all(run)
    report = run.path("evaluation", "report.html")
    objective = next(iter(run.config.rewards))
    console.print(
        f"\nReport: [bold]{report}[/bold]\n"
        f'Steer it yourself: [bold]vas generate {run.location} "How was your day?" --strength {objective}=5[/bold]\n'
        "Then: a negative strength inverts an objective; several --strength compose. "
        "Your own run starts from a copy of the config: your model, your prompts, your rewards.",
        highlight=False,
    )


@app.command(epilog="Example: `vas rollout configs/demo.yaml --set name=mine --set rollouts.samples_per_prompt=16`")
def rollout(
    target: Target,
    set_: Overrides = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="Score this run's responses instead of sampling them again."),
    ] = None,
) -> None:
    """Sample rollouts from the base model and score them with the rewards."""
    from vas.run import stages

    stages.rollout(_open(target, set_), source)


@app.command(epilog="Example: `vas train runs/demo --set resources.workers=2`")
def train(target: Target, set_: Overrides = None) -> None:
    """Fit the value model to a run's rollouts."""
    from vas.run import stages

    stages.train(_open(target, set_))


@app.command(epilog="Example: `vas evaluate runs/demo`")
def evaluate(target: Target, set_: Overrides = None) -> None:
    """Compare base, best-of-N and VAS on the held-out prompts, and write the report."""
    from vas.run import stages

    stages.evaluate(_open(target, set_))


@app.command(
    epilog='Example: `vas generate runs/demo "Tell me about Mondays" -s positive=5 -s brief=-1` (a negative '
    "strength inverts an objective; none at all is the base model)"
)
def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run with a trained value model.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    strength: Annotated[
        list[str] | None,
        typer.Option("--strength", "-s", metavar="OBJECTIVE=β", help="How strongly to steer. Repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Responses to sample.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the run's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response. Default: the run's.")] = None,
    candidates: Annotated[int | None, typer.Option(min=1, help="Tokens scored a step. Default: the run's.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="SCHEDULE", help="Steps guided: token, entropy:NATS or block:TOKENS. Default: the run's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="No colours for what guidance moved.")] = False,
) -> None:
    """Answer a prompt with the guided model, streaming; colours show what guidance moved."""
    strengths = _strengths(strength)  # a slip shows at once, not after torch has loaded
    from vas.cli.generate import generate_text

    generate_text(run, prompt, strengths, samples, temperature, max_tokens, candidates, schedule, seed, plain)


@app.command(
    epilog="Example: `vas serve runs/demo`, then point any OpenAI client at http://127.0.0.1:8000/v1 and add "
    '`extra_body={"guidance": {"objectives": {"positive": 4}}}`.'
)
def serve(
    target: Annotated[
        str, typer.Argument(metavar="RUN|CONFIG", help="A trained run, or a YAML file of Serving's keys.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, e.g. `--set placement=deployment`. Repeatable."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen at; 0.0.0.0 for every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
) -> None:
    """Serve a run's models behind an OpenAI-compatible endpoint, until Ctrl-C."""
    from vas.cli.serve import serve_forever

    serve_forever(target, set_ or [], host, port)


@app.command(
    epilog="Example: `vas submit configs/demo.yaml --run s3://bucket/runs/demo --address http://127.0.0.1:8265`; "
    "again, it goes on where it stopped. `vas submit --attach JOB` follows a job that runs."
)
def submit(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A config file in this directory, which the cluster is sent.")
    ] = None,
    set_: Overrides = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="DIR", help="Where the run lies, in place of the config's own.")
    ] = None,
    stage: Annotated[Stage, typer.Option(metavar="STAGE", help="rollouts, train, evaluate or all.")] = "all",
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The cluster's dashboard. Default: RAY_API_SERVER_ADDRESS.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="NAME[=VALUE]", help="Given to the job, and shown by the dashboard; default this shell's."
        ),
    ] = None,
    attach: Annotated[str | None, typer.Option(metavar="JOB", help="Follow this job; nothing is submitted.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow it.")] = False,
) -> None:
    """Run a config on a Ray cluster, as a job that goes on whatever becomes of this terminal."""
    from vas.cli import submit as jobs

    if (config is None) == (attach is None):
        raise VasError("give a config to submit, or --attach and a job")
    if attach is not None:
        client, job = jobs.connect(address), attach
    else:
        assert config is not None
        jobs.check_place(run or load_config(config, set_ or ()).runs_dir)
        client, job = jobs.submit(config, stage, run, set_ or [], env or [], address)
    again = f"vas submit --attach {job}" + (f" --address {address}" if address else "")
    console.print(f"Job [bold]{job}[/bold]; follow it with: {again}", highlight=False, soft_wrap=True)
    if detach:
        return
    try:
        code = jobs.follow(client, job)
    except KeyboardInterrupt:
        stop = again.replace("vas submit --attach", "ray job stop")
        console.print(f"\nThe job goes on. `{again}` follows it, `{stop}` stops it.", highlight=False)
        raise typer.Exit(_INTERRUPTED) from None
    raise typer.Exit(code)


@app.command("key", epilog="Example: `vas key alice >> keys.yaml`, and `--set gate.keys=keys.yaml`")
def new_key(name: Annotated[str, typer.Argument(help="Whose key it is; stands in logs and metrics.")]) -> None:
    """Make an API key: the key itself goes to the terminal, its entry for the keys file to the output."""
    from vas.configfile import validated
    from vas.serving.keys import Key
    from vas.serving.keys import new_key as make

    key, digest = make()
    entry = validated(Key, {"name": name, "sha256": digest}, f"vas key {name}")
    console.print(f"The key, shown this once: [bold]{key}[/bold]", highlight=False)
    print(f"  - name: {json.dumps(entry.name)}\n    sha256: {entry.sha256}")


@app.command(epilog="Example: `vas rewards`")
def rewards() -> None:
    """List the built-in rewards and their parameters."""
    from rich.console import Console
    from rich.table import Table

    from vas.rewards import builtin_rewards

    table = Table("use", "what it scores", "params", "needs", box=None, header_style="bold")
    table.columns[0].no_wrap = True  # a name to be copied
    for info in builtin_rewards():
        params = ", ".join(f"{name}={default}" for name, default in info.params.items())
        needs = "" if info.package is None else info.package + ("" if info.installed else "  (not installed)")
        table.add_row(info.name, info.doc, params, needs)
    table.add_row("hf:MODEL", "a Hugging Face sequence-classification reward model", "see docs/rewards.md", "")
    table.add_row("python:module.function", "your own: function(prompts, responses) → scores", "passed on", "")
    Console().print(table)


@config_app.command("show", epilog="Example: `vas config show configs/demo.yaml --set seed=1`")
def config_show(config: ConfigFile, set_: Overrides = None) -> None:
    """Print the resolved config, every default spelled out, and its digest."""
    resolved = load_config(config, set_ or ())
    print(f"# digest {resolved.digest()}\n{resolved.yaml()}", end="")


@config_app.command("check", epilog="Example: `vas config check configs/demo.yaml`")
def config_check(config: ConfigFile, set_: Overrides = None) -> None:
    """Check a config, and that its model, prompts and rewards can be had."""
    from vas.prompts import load_prompts
    from vas.run.stages import check

    resolved = load_config(config, set_ or ())
    prompts = load_prompts(resolved.prompts)
    check(resolved)
    held_out = sum(prompt.held_out for prompt in prompts)
    console.print(
        f"{config} is fine: {len(prompts)} prompts ({held_out} held out), "
        f"rewards {', '.join(resolved.rewards)}, base model {resolved.base.model}",
        highlight=False,
    )


def _open(target: str, overrides: list[str] | None) -> RunDirectory:
    """The run of a config file or a run directory, with overrides."""
    from vas.run.directory import RunDirectory

    if target.endswith((".yaml", ".yml")):
        return RunDirectory.create(load_config(target, overrides or ()))
    return RunDirectory.open(target, overrides or ())


def _strengths(options: list[str] | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for option in options or ():
        name, separator, text = option.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            separator = ""
        if not separator:
            raise VasError("a strength reads OBJECTIVE=NUMBER", f"--strength {option}", "e.g. --strength positive=2")
    return found


def _unraisable(raised: Any) -> None:
    """What Ray's objects raise while they are collected, as after Ctrl-C, would be shown with its stack."""
    if not str(getattr(raised.object, "__module__", "")).startswith("ray."):
        sys.__unraisablehook__(raised)


@contextmanager
def program() -> Iterator[None]:
    """What every program of ours does around its work: quiet libraries, readable errors, and the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a hub out of reach is told of once, by our own error
    sys.unraisablehook = _unraisable
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as ended:
        if isinstance(ended, SystemExit) and ended.code not in (
            _INTERRUPTED,
            signal.SIGTERM,
        ):  # Ray exits with a signal
            raise
        console.print("\n[yellow]Interrupted.[/yellow] What is finished is kept; the same command goes on from there.")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        known = as_vas_error(error)
        if known is None:
            raise
        console.print(Panel(escape(str(known)), title="error", title_align="left", border_style="red"))
        sys.exit(2)


def main() -> None:
    """The command line."""
    with program():
        app()


if __name__ == "__main__":
    main()
