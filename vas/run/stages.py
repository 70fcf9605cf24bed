"""The stages of a run: prompts → rollouts → train → evaluate. Finished ones are skipped.

With several rounds, rollouts and training take turns; the last round's stages have the plain names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import zip_longest
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from vas import storage
from vas.config import RunConfig
from vas.errors import VasError
from vas.progress import console
from vas.prompts import StoredPrompts, store_prompts, stream_prompts
from vas.rewards import load_rewards
from vas.run.directory import RunDirectory, versions
from vas.schema import Prompt

if TYPE_CHECKING:
    from vas.rollouts.ledger import Ledger

LEARNED = 0.02  # of the reward's variance on held-out prompts: with less, a value model knows nothing


def check(config: RunConfig) -> None:
    """Find what would stop a run before it starts, but for the prompts. Raises VasError for what cannot be loaded."""
    load_rewards(config.rewards)

    from transformers import AutoConfig  # slow to import, so after what may fail at once

    from vas.decoding.sequence import GuidanceParams
    from vas.models.base import load_pretrained, quieten
    from vas.models.served import ServedModel
    from vas.models.server import Server
    from vas.training.spelling import Spelling

    quieten()
    if config.base.called:
        served = ServedModel(Server(config.base))
        console.print(f"server       {served.abilities()}", highlight=False)
        how = GuidanceParams.of(config.evaluation, config.evaluation.strengths[0])
        served.check(how.blockwise, whole=(how.block_size or 0) >= config.rollouts.sampling.max_tokens)
    else:
        load_pretrained(AutoConfig, config.base.model, config.base.revision)
    source, revision = config.backbone()
    layers = load_pretrained(AutoConfig, source, revision).get_text_config().num_hidden_layers
    if config.value.layers and config.value.layers > layers:
        raise VasError(f"the backbone has {layers} layers, fewer than {config.value.layers}", "value.layers")
    if spelling := Spelling.of(config):
        spelling.load()
        console.print("tokenizers   differ, so the value model reads the text of responses", highlight=False)


def prepare(run: RunDirectory) -> StoredPrompts:
    """The run's prompts, as it first read them."""
    file = run.path("prompts", "prompts.parquet")
    if run.done("prompts"):
        return StoredPrompts(file)
    with run.stage("prompts") as about:
        check(run.config)
        counts = {True: 0, False: 0}

        def counted() -> Iterator[Prompt]:
            for prompt in stream_prompts(run.config.prompts):
                counts[prompt.held_out] += 1
                yield prompt

        prompts = store_prompts(file, counted())
        about |= {"train": counts[False], "held_out": counts[True]}
    console.print(f"prompts      {about['train']} to train on, {about['held_out']} held out", highlight=False)
    return prompts


def rollout(run: RunDirectory, source: str | None = None) -> None:
    """Sample and score rollouts, for both sides of the split: every round whose value model is there.

    source: a run whose responses are taken over and scored with this run's rewards; only what it lacks is sampled.
    Raises VasError if its responses are not those that this run would sample.
    """
    if source is not None:
        source = storage.absolute(source)  # workers have other working directories
        _check_source(run.config, source)
    prepare(run)
    for number in range(run.config.rounds):
        if number and not run.done(_name("train", run, number - 1)):
            console.print(
                f"round {number} begins with a value model: `vas train {run.location}` first", highlight=False
            )
            return
        _rollout(run, number, source)


def _check_source(config: RunConfig, source: str) -> None:
    """Raises VasError if the run at `source` samples other responses in its first round than the config does."""
    run = RunDirectory.open(source)
    ours, theirs = (each.responses() for each in (config, run.config))
    differ = [part for part in ours if ours[part] != theirs[part]]
    stored = StoredPrompts(run.path("prompts", "prompts.parquet")) if run.done("prompts") else ()
    if any(one != other for one, other in zip_longest(stream_prompts(config.prompts), stored)):
        differ.append("prompts")
    if differ:
        raise VasError(
            f"that run's responses are not this config's: {', '.join(differ)} differ",
            source,
            "let the two configs differ in rewards, value, train and evaluation alone",
        )


def _rollout(run: RunDirectory, number: int, source: str | None = None) -> None:
    """One round: π0's own rollouts, or such as begin under the guidance of the round before.

    Until the training that follows has begun, rows that failed are tried again.
    """
    from vas.rollouts.pipeline import rescore, sample
    from vas.rollouts.plan import Plan, setting_key

    prompts, config = prepare(run), run.config
    location = run.path("rollouts", f"round={number}")
    roll_in = [setting_key(strengths) for strengths in config.roll_in()] if number else []

    def body(about: dict, ledger: Ledger | None) -> str:
        plan = Plan(prompts, config.rollouts.samples_per_prompt, config.seed, number, roll_in=roll_in)
        value = _value(run, number - 1) if number else None
        if source is not None and not number:
            rescore(config, plan, storage.join(source, "rollouts", "round=0"), location, "scoring")
        summary = sample(config, [plan], location, _name("rollouts", run, number), value, ledger)
        _refuse_empty(summary.rows, summary.errors, location)
        _summarize(run, number, location)
        about |= {
            "rows": summary.rows,
            "errors": summary.errors,
            "tokens_per_s": round(summary.tokens_per_s, 1),
        }
        failed = f", {sum(summary.errors.values())} failed" if summary.errors else ""
        rate = f", {summary.tokens_per_s:.0f} tokens/s" if summary.sampled else ", all of them there already"
        return f"{summary.rows} rollouts{failed}{rate}"

    stage = _name("rollouts", run, number)
    failed = run.about(stage).get("errors") and not run.about(_name("train", run, number))
    _stage(run, stage, body, again=bool(failed))


def _summarize(run: RunDirectory, number: int, location: str) -> None:
    """Put the round into rollouts/summary.json, and draw it."""
    from vas.evaluation.figures_rollouts import draw
    from vas.rollouts.summary import summarize

    file = run.path("rollouts", "summary.json")
    rounds = json.loads(storage.read_bytes(file)) if storage.exists(file) else {}
    rounds[f"round={number}"] = summarize(location, run.config.rewards)
    storage.write_bytes(file, json.dumps(rounds, indent=2).encode())
    storage.write_bytes(run.path("rollouts", f"round={number}.png"), draw(rounds[f"round={number}"]))


def train(run: RunDirectory) -> None:
    """Fit the value model to the rollouts: of every round that has them."""
    for number in range(run.config.rounds):
        if not run.done(_name("rollouts", run, number)):
            which = f" of round {number}" if run.config.rounds > 1 else ""
            raise VasError(f"the rollouts{which} are not finished", run.location, f"vas rollout {run.location}")
        fresh = not run.done(_name("train", run, number))
        _train(run, number)
        if fresh and not _last(run, number):
            console.print(f"round {number + 1} follows: `vas rollout {run.location}`", highlight=False)
            return


def _train(run: RunDirectory, number: int) -> None:
    """Fit a value model to the rollouts of all rounds up to this one."""
    from vas.training.trainer import train as fit

    def body(about: dict, ledger: Ledger | None) -> str:
        rounds = [run.path("rollouts", f"round={earlier}") for earlier in range(number + 1)]
        place = run.path("train") if _last(run, number) else run.path("train", f"round={number}")
        metrics = fit(run.config, rounds, place, _value(run, number))
        explained = {name: m["explained_variance"] for name, m in metrics["held_out"].items()}
        losses = metrics["losses"]
        about |= {"epoch": metrics["epoch"], "loss": sum(losses) / len(losses), "explained_variance": explained}
        _warn_of_nothing_learned(explained)
        return "explained variance on held-out prompts: " + ", ".join(f"{n} {v:.2f}" for n, v in explained.items())

    _stage(run, _name("train", run, number), body)


def _warn_of_nothing_learned(explained: dict[str, float]) -> None:
    """Guidance by a value model that knows no more than the mean reward moves responses for nothing."""
    useless = [name for name, share in explained.items() if not share > LEARNED]
    if useless:
        console.print(
            f"[yellow]The value model has hardly learned {' or '.join(useless)}[/yellow]: guidance by it will move "
            "responses and not their reward. If rewards differ at all (rollouts/round=0.png), more prompts, epochs, "
            "another train.lr or more value.layers may help.",
            highlight=False,
        )


def evaluate(run: RunDirectory) -> None:
    """Compare base, best-of-N and VAS on the held-out prompts; write the report."""
    if not run.done("train"):
        raise VasError("there is no finished value model", run.location, f"vas train {run.location}")
    from vas.evaluation.run import Inputs
    from vas.evaluation.run import evaluate as compare

    def body(about: dict, ledger: Ledger | None) -> str:
        inputs = Inputs(
            run.rollouts, run.value, run.path("evaluation"), run.seconds(), _about(run), run.revision, ledger
        )
        compare(run.config, (prompt for prompt in prepare(run) if prompt.held_out), inputs)
        return f"report: {run.path('evaluation', 'report.html')}"

    _stage(run, "evaluate", body)


STAGES: dict[str, Callable[..., None]] = {
    "rollouts": rollout,
    "train": train,
    "evaluate": evaluate,
}


def run_all(run: RunDirectory) -> None:
    """Every stage in turn, on one cluster; finished ones are skipped."""
    from vas.placement import require, stage_groups
    from vas.run.cluster import ray_cluster

    prepare(run)
    finished = all(run.done(name) for name in STAGES)
    with ExitStack() as stack:
        if not finished:  # else nothing is written, and nobody need be kept from it
            stack.enter_context(run.held())
            stack.enter_context(ray_cluster(run.config.resources))
            for name in STAGES:  # before hours of work for a run that cannot be finished
                if not run.done(name):
                    require(stage_groups(name, run.config.resources), ahead=True)
        for number in range(run.config.rounds):
            _rollout(run, number)
            _train(run, number)
        evaluate(run)


def _last(run: RunDirectory, number: int) -> bool:
    return number == run.config.rounds - 1


def _name(stage: str, run: RunDirectory, number: int) -> str:
    """What a round's stage is called in run.json."""
    return stage if _last(run, number) else f"{stage} {number}"


def _value(run: RunDirectory, number: int) -> str:
    """Where the value model of a round lies."""
    return run.value if _last(run, number) else f"{run.value}-round={number}"


def _stage(run: RunDirectory, name: str, body: Callable[[dict, Ledger | None], str], again: bool = False) -> None:
    """Run a stage unless it is done, on the run's cluster, and say how it went. again: run it even so."""
    from vas.placement import require, stage_groups
    from vas.rollouts.ledger import Ledger, words
    from vas.run.cluster import ray_cluster

    if run.done(name) and not again:
        console.print(f"{name:<12} done already", highlight=False)
        return
    _check_rewards(run)
    with ray_cluster(run.config.resources), run.stage(name) as about:
        require(stage_groups(name, run.config.resources))
        with Ledger.of(run.config.base, run.path("usage.json")) as ledger:
            before = ledger.spent() if ledger is not None else {}
            outcome = body(about, ledger)
            spent = ledger.spent() if ledger is not None else {}
            outcome += f", {words(spent)} so far" if spent != before else ""
    console.print(f"{name:<12} {outcome} ({about['seconds']:.0f} s)", highlight=False)


def _check_rewards(run: RunDirectory) -> None:
    """All scores of a run must be the same rewards'. Raises VasError if one has changed since there were any."""
    file = run.path("rollouts", "rewards.json")
    now = {name: reward.version for name, reward in load_rewards(run.config.rewards).items()}
    known = json.loads(storage.read_bytes(file)) if storage.exists(file) else {}
    changed = [name for name, version in now.items() if version != known.get(name, version)]
    if changed and _any_scored(run):
        name = changed[0]
        raise VasError(
            f"the reward '{name}' has changed since this run began: it was {known[name]}, and is {now[name]}",
            run.location,
            f"restore it, or give the run another name: `vas rollout CONFIG --from {run.location}` scores its "
            "responses anew",
        )
    if known != now and not run.done(_name("rollouts", run, 0)):
        storage.write_bytes(file, json.dumps(now, indent=2).encode())


def _any_scored(run: RunDirectory) -> bool:
    """Whether any response has a reward."""
    from vas.rollouts.stored import read_rollouts

    return bool(len(read_rollouts(run.path("rollouts"), ["error"], where=pc.field("error").is_null())))


def _about(run: RunDirectory) -> dict[str, str]:
    """What the report says of the run."""
    prompts = run.about("prompts")
    rounds = [run.about(_name("rollouts", run, number)) for number in range(run.config.rounds)]
    rows, failed = sum(each["rows"] for each in rounds), sum(sum(each["errors"].values()) for each in rounds)
    value = run.config.value
    return {
        "run": run.config.name,
        "base model": run.config.base.model,
        "value model": f"{value.backbone or run.config.base.model}, "
        + (f"first {value.layers} layers" if value.layers else "all layers")
        + f", {value.head} head",
        "prompts": f"{prompts['train']} to train on, {prompts['held_out']} held out",
        "rollouts": f"{rows}, {failed} of them failed" + (f", in {len(rounds)} rounds" if len(rounds) > 1 else ""),
        "seed": str(run.config.seed),
        "value model trained": run.about("train").get("finished", ""),
        "git revision": run.revision,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _refuse_empty(rows: int, errors: dict[str, int], where: str) -> None:
    """A stage whose every row failed is no success."""
    if rows and sum(errors.values()) >= rows:
        kinds = "".join(f"\n  - {count} × {kind}" for kind, count in errors.items())
        raise VasError(f"every rollout failed:{kinds}", where)
