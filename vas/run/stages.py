"""The stages of a run: prompts → rollouts → train → evaluate. Finished ones are skipped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from vas import storage
from vas.config import RunConfig
from vas.errors import VasError
from vas.progress import console
from vas.prompts import load_prompts, prompts_from_table, prompts_to_table
from vas.rewards import load_rewards
from vas.run.directory import RunDirectory, versions
from vas.schema import Prompt


def check(config: RunConfig) -> list[Prompt]:
    """Find what would stop a run before it starts; returns the prompts.

    Raises VasError for what cannot be read or loaded.
    """
    prompts = load_prompts(config.prompts)
    load_rewards(config.rewards)

    from transformers import AutoConfig  # slow to import, so after what may fail at once

    from vas.models.base import load_pretrained, load_tokenizer, quieten, tokenizer_digest

    quieten()
    load_pretrained(AutoConfig, config.base.model, config.base.revision)
    source, revision = config.backbone()
    layers = load_pretrained(AutoConfig, source, revision).get_text_config().num_hidden_layers
    if config.value.layers and config.value.layers > layers:
        raise VasError(f"the backbone has {layers} layers, fewer than {config.value.layers}", "value.layers")
    base, backbone = (
        tokenizer_digest(load_tokenizer(*model))
        for model in ((config.base.model, config.base.revision), (source, revision))
    )
    if base != backbone:
        raise VasError(
            "the value model's backbone and the base model have different tokenizers",
            f"value.backbone: {source}, base.model: {config.base.model}",
            "use a backbone that shares the base model's tokenizer, such as its smaller sibling",
        )
    return prompts


def prepare(run: RunDirectory) -> list[Prompt]:
    """The run's prompts, as it first read them."""
    file = run.path("prompts", "prompts.parquet")
    if run.done("prompts"):
        return prompts_from_table(storage.read_table([file]))
    with run.stage("prompts") as about:
        prompts = check(run.config)
        storage.write_table(file, prompts_to_table(prompts))
        about["train"] = sum(not p.held_out for p in prompts)
        about["held_out"] = sum(p.held_out for p in prompts)
    console.print(f"prompts      {about['train']} to train on, {about['held_out']} held out", highlight=False)
    return prompts


def rollout(run: RunDirectory) -> None:
    """Sample and score the base model's rollouts, for both sides of the split."""
    from vas.rollouts.jobs import Plan
    from vas.rollouts.pipeline import sample

    prompts = prepare(run)

    def body(about: dict) -> str:
        plan = Plan(prompts, run.config.rollouts.samples_per_prompt, run.config.seed)
        summary = sample(run.config, [plan], run.rollouts, "rollouts")
        _refuse_empty(summary.rows, summary.errors, run.rollouts)
        about |= {
            "rows": summary.rows,
            "errors": summary.errors,
            "tokens_per_s": round(summary.tokens_per_s, 1),
        }
        failed = f", {sum(summary.errors.values())} failed" if summary.errors else ""
        rate = f", {summary.tokens_per_s:.0f} tokens/s" if summary.sampled else ", all of them there already"
        return f"{summary.rows} rollouts{failed}{rate}"

    _stage(run, "rollouts", body)


def train(run: RunDirectory) -> None:
    """Fit the value model to the rollouts."""
    if not run.done("rollouts"):
        raise VasError("the rollouts are not finished", run.location, f"vas rollout {run.location}")
    from vas.training.trainer import train as fit

    def body(about: dict) -> str:
        metrics = fit(run.config, run.rollouts, run.path("train"), run.value)
        explained = {name: m["explained_variance"] for name, m in metrics["held_out"].items()}
        losses = metrics["losses"]
        about |= {"epoch": metrics["epoch"], "loss": sum(losses) / len(losses), "explained_variance": explained}
        return "explained variance on held-out prompts: " + ", ".join(f"{n} {v:.2f}" for n, v in explained.items())

    _stage(run, "train", body)


def evaluate(run: RunDirectory) -> None:
    """Compare base, best-of-N and VAS on the held-out prompts; write the report."""
    if not run.done("train"):
        raise VasError("there is no finished value model", run.location, f"vas train {run.location}")
    from vas.evaluation.run import Inputs
    from vas.evaluation.run import evaluate as compare

    def body(about: dict) -> str:
        inputs = Inputs(run.rollouts, run.value, run.path("evaluation"), run.seconds(), _about(run), run.revision)
        compare(run.config, prepare(run), inputs)
        return f"report: {run.path('evaluation', 'report.html')}"

    _stage(run, "evaluate", body)


STAGES: dict[str, Callable[[RunDirectory], None]] = {
    "rollouts": rollout,
    "train": train,
    "evaluate": evaluate,
}


def run_all(run: RunDirectory) -> None:
    """Every stage in turn, on one cluster; finished ones are skipped."""
    from vas.run.cluster import ray_cluster

    prepare(run)
    finished = all(run.done(name) for name in STAGES)
    with nullcontext() if finished else ray_cluster(run.config.resources):
        for stage in STAGES.values():
            stage(run)


def _stage(run: RunDirectory, name: str, body: Callable[[dict], str]) -> None:
    """Run a stage unless it is done, on the run's cluster, and say how it went."""
    from vas.run.cluster import ray_cluster

    if run.done(name):
        console.print(f"{name:<12} done already", highlight=False)
        return
    with ray_cluster(run.config.resources), run.stage(name) as about:
        outcome = body(about)
    console.print(f"{name:<12} {outcome} ({about['seconds']:.0f} s)", highlight=False)


def _about(run: RunDirectory) -> dict[str, str]:
    """What the report says of the run."""
    prompts, rollouts = run.about("prompts"), run.about("rollouts")
    value = run.config.value
    return {
        "run": run.config.name,
        "base model": run.config.base.model,
        "value model": f"{value.backbone or run.config.base.model}, "
        + (f"first {value.layers} layers" if value.layers else "all layers")
        + f", {value.head} head",
        "prompts": f"{prompts['train']} to train on, {prompts['held_out']} held out",
        "rollouts": f"{rollouts['rows']}, {sum(rollouts['errors'].values())} of them failed",
        "seed": str(run.config.seed),
        "git revision": run.revision,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _refuse_empty(rows: int, errors: dict[str, int], where: str) -> None:
    """A stage whose every row failed is no success."""
    if rows and sum(errors.values()) >= rows:
        kinds = "\n         ".join(f"{count} × {kind}" for kind, count in errors.items())
        raise VasError("every rollout failed", where, kinds)
