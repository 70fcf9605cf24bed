"""A run's configuration: one YAML file is the whole truth of a run.

Every key has a type, a default and a meaning here; an unknown key is an error that
names the nearest right one; `--set a.b=c` overrides. `RunConfig.digest()` identifies a
run: everything counts but `resources`, `runs_dir` and PLACES, which say where a run computes and lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vas.choices import LEAST_TEMPERATURE, SCHEDULE, Linears
from vas.configfile import Name, Section, read_config, validated
from vas.errors import nearest

Strengths = dict[str, float]

# Keys of other sections that, as `resources` do, say where and how patiently a run computes, and not what.
PLACES = {
    "base": {"openai", "api_key_env", "concurrency", "timeout", "attempts", "most_calls", "most_tokens"},
    "rollouts": {"tensor_parallel"},
}


class Base(Section):
    model: str
    """Hugging Face id, a local path, or a `bundled:` name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    linears: Linears = "exact"
    """Linear layers of base and value model on a CPU: in the model's dtype, or nearly as exact and faster:
    with bfloat16 or 8-bit weights. `fastest` measures which is, on this machine."""
    tokenizer: str | None = None
    """Its tokenizer's id or path, where `model` is not one, as for a model that can only be called."""
    openai: str | None = None
    """Base URL of an OpenAI-compatible server that serves the model: its weights are not needed then."""
    api_key_env: str | None = None
    """Environment variable that holds that server's key."""
    served_name: str | None = None
    """The model's name at that server; default `model`."""
    local_weights: bool = False
    """Load the weights although there is a server: then it samples rollouts, and responses are guided here."""
    concurrency: int = Field(16, gt=0)
    """Calls of the server in flight at once, per actor."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that a call may take before it is tried again."""
    attempts: int = Field(6, gt=0)
    """How often a call is sent before its response counts as failed."""
    most_calls: int | None = Field(None, gt=0)
    """Calls that a run may make in all, retries included. What is unfinished then waits for a larger number."""
    most_tokens: int | None = Field(None, gt=0)
    """Tokens that a run may be charged for in all, prompts included, as the server counts them."""

    @property
    def tokenizer_id(self) -> str:
        """Where its tokenizer is found."""
        return self.tokenizer or self.model

    @property
    def called(self) -> bool:
        """Whether the model is only called, and its weights are never loaded."""
        return self.openai is not None and not self.local_weights


class Prompts(Section):
    source: str
    """Path or URI (.jsonl, .parquet, .txt, or a directory of them), or a `bundled:` name."""
    field: str | None = None
    """Column that holds the prompt; by default the first there is of `messages`, `prompt`, `question`, `text`."""
    system: str | None = None
    """System message put before prompts that bring none."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of prompts kept for evaluation, picked by a hash of prompt_id."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many prompts."""


class Reward(Section):
    use: str
    """A built-in name (`vas rewards` lists them), `hf:MODEL`, or `python:module.function`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward."""


class TokenSampling(Section):
    temperature: float = Field(1.0, ge=0)
    """Of the base model; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens that together have this probability; 1 keeps every token."""
    top_k: int = Field(0, ge=0)
    """0 keeps every token."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drop tokens below this share of the likeliest one's probability."""

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"give 0 for greedy, or at least {LEAST_TEMPERATURE:g}")
        return temperature


class Sampling(TokenSampling):
    max_tokens: int = Field(128, gt=0)
    """Longest response, in tokens."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a response (left out of it)."""


class Rollouts(Section):
    samples_per_prompt: int = Field(8, gt=0)
    """Responses sampled for every prompt."""
    batch_size: int = Field(128, gt=0)
    """Sequences an actor decodes at once; a batch is also what a crash can cost."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How the next token is drawn; guided responses are drawn the same way."""
    roll_in: list[Strengths] = Field(default_factory=list)
    """Settings of β under which responses begin in rounds after the first; by default those of evaluation."""
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """What samples rollouts: this package, vLLM inside the actors, or the server at `base.openai`, which is the
    default where there is one. Guided responses are sampled by `transformers`, or with that server's help."""
    tensor_parallel: int = Field(1, gt=0)
    """GPUs that share one model, with the engine `vllm`; an actor needs as many."""


class Lora(Section):
    rank: int = Field(16, gt=0)
    """Rank of the adapters."""
    alpha: int = Field(32, gt=0)
    """Their scale is alpha / rank."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get one: all linear ones, or those whose names end like these."""


class Value(Section):
    name: Name = "default"
    """Folder under `value/` in the run directory."""
    backbone: str | None = None
    """Hugging Face id or path; the base model when empty."""
    layers: int | None = Field(None, gt=0)
    """Keep only the first so many layers of the backbone."""
    head: Literal["categorical", "scalar"] = "categorical"
    """What a hidden state becomes: a histogram of rewards, or one number."""
    bins: int = Field(41, ge=2)
    """Histogram bins of the categorical head."""
    label: Literal["hl_gauss", "two_hot"] = "hl_gauss"
    """How a target becomes a histogram."""
    extends: str | None = None
    """A value model that stays as it is and gets heads for this run's rewards: only they are trained, in minutes."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the backbone's own weights; the checkpoint has them merged in."""

    @model_validator(mode="after")
    def _consistent(self) -> Value:
        if self.extends is not None and (self.lora or self.layers or self.backbone):
            raise ValueError("extends brings its backbone, frozen: leave out backbone, layers and lora")
        return self


class Train(Section):
    td_lambda: float = Field(0.95, ge=0, le=1)
    """λ of TD(λ); 1 is Monte Carlo."""
    epochs: int = Field(2, gt=0)
    """Passes over the training rollouts."""
    batch_size: int = Field(16, gt=0)
    """Prompts per optimizer step, over all workers; each brings all its rollouts."""
    micro_batch_size: int = Field(4, gt=0)
    """Prompts per forward pass on one worker; the rest is gradient accumulation."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of the backbone."""
    head_lr: float = Field(3e-3, gt=0)
    """Peak learning rate of the heads."""
    weight_decay: float = Field(0.01, ge=0)
    """Of the backbone's matrices; biases, norms and heads have none."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; then it falls along a cosine."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest norm of a step's gradient."""
    train_embeddings: bool = False
    """Train the token embeddings too (they are large, and rarely need it)."""
    target_ema: float | None = Field(None, gt=0, lt=1)
    """Take TD targets from a second network that keeps this share of itself at every step, instead of from the
    current weights; it needs a second forward pass, and λ below 1 to matter."""
    patience: int | None = Field(None, gt=0)
    """Stop after so many epochs without a better held-out explained variance; the best epoch is kept in any case."""
    checkpoint_steps: int = Field(200, gt=0)
    """Optimizer steps between checkpoints that a broken-off training goes on from; one more ends each epoch."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 with float32 master weights on a GPU, float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: a third more work, much less memory."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What workers share out (ZeRO): nothing, optimizer states, gradients too, weights too. Default 2 with
    several GPU workers, else 0."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Keep optimizer states, and at stage 3 weights, in main memory or on a disk."""
    nvme_path: str | None = None
    """Folder on the disk that `offload: nvme` uses."""
    deepspeed: dict[str, Any] | str = Field(default_factory=dict)
    """DeepSpeed JSON, or the location of a file of it, merged over ours. Batch sizes and the learning rate's
    course are the run's to say."""
    track: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(["tensorboard"])
    """Where learning curves go; TensorBoard's files lie in `train/tensorboard`."""

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.target_ema is not None and self.zero_stage == 3:
            raise ValueError("target_ema keeps a second network whole, which zero_stage 3 does not: take 2 or less")
        if self.offload != "none" and not self.zero_stage:
            raise ValueError("offload moves what ZeRO shares out, and stage 0 shares nothing: set zero_stage to 2 or 3")
        if self.offload == "nvme" and (self.zero_stage != 3 or not self.nvme_path):
            raise ValueError("offload to NVMe needs zero_stage 3 and nvme_path, a folder on that disk")
        return self


class Evaluation(Section):
    best_of: list[Annotated[int, Field(gt=1)]] = Field(default_factory=lambda: [2, 4, 8])
    """N of best-of-N, at most rollouts.samples_per_prompt."""
    strengths: list[Strengths] = Field(default_factory=list)
    """Settings of β to decode with; by default each objective alone at 2, 4 and 8, and all at 4."""
    samples_per_prompt: int = Field(1, gt=0)
    """Guided responses per held-out prompt and setting."""
    candidates: int = Field(20, gt=0)
    """k: tokens that guidance scores at a step, by base probability; EOS always is one more."""
    value: Literal["expected", "soft"] = "expected"
    """Which value of a categorical head guides."""
    baseline: Literal["policy", "mean"] = "policy"
    """What an advantage is measured from: π0-weighted, or the plain mean (the authors')."""
    outside: Literal["keep", "drop"] = "keep"
    """Tokens outside the candidates keep π0's probability, or are dropped."""
    candidate_mass: float = Field(1.0, gt=0, le=1)
    """Adaptive k: stop taking candidates once they have this base probability together; 1 takes all k."""
    schedule: str = Field("token", pattern=f"^({SCHEDULE})$")
    """Steps that are guided: `token`, every one; `entropy:h`, those where the base's entropy exceeds h nats;
    `block:b`, once in b tokens, a choice between `candidates` continuations of that length."""
    bootstrap: int = Field(2000, gt=0)
    """Resamples for the 95 % intervals."""
    samples_shown: int = Field(8, ge=0)
    """Prompts shown side by side in the report."""
    trust_prompts: int = Field(32, ge=0)
    """Held-out prompts with a half-finished response that is completed, to see if values come true; 0: none."""
    trust_completions: int = Field(10, ge=2)
    """Completions that the base model samples for each of them."""


class Resources(Section):
    """Where a run computes. Not part of its identity."""

    address: str | None = None
    """Ray cluster to join (`auto`, `ray://…`); empty starts one on this machine."""
    num_cpus: int | None = Field(None, gt=0)
    """Cores to use on this machine when we start Ray; default all."""
    object_store_memory: int = Field(512 * 1024**2, ge=78643200)
    """Bytes of shared memory when we start Ray."""
    actors: int | None = Field(None, gt=0)
    """Sampler actors; default as many as fit."""
    max_actors: int | None = Field(None, gt=0)
    """Let the pool of sampler actors grow to so many, when the cluster has room or scales up; default: it is fixed."""
    cpus_per_actor: int = Field(1, gt=0)
    """Torch threads of a sampler actor."""
    gpus_per_actor: float = Field(0, ge=0)
    """GPUs of a sampler actor; a fraction shares one."""
    actors_on: Name | None = None
    """Machines for sampler actors: those that have this custom resource, as `ray start --resources
    '{"sampling": 1}'` gives it. Default any."""
    kv_tokens: int | None = Field(None, gt=0)
    """Tokens that each model's KV cache may hold in a sampler actor; what outgrows it waits. Default no limit."""
    reward_actors: int = Field(1, gt=0)
    """Actors that score rollouts."""
    cpus_per_reward_actor: float = Field(0, ge=0)
    """CPUs kept for each; by default they run beside the sampler actors, where scoring is light."""
    gpus_per_reward_actor: float = Field(0, ge=0)
    """GPUs of a reward actor, for `hf:` rewards."""
    reward_actors_on: Name | None = None
    """Machines for reward actors, by their custom resource. Default any."""
    workers: int = Field(1, gt=0)
    """Training workers."""
    cpus_per_worker: int | None = Field(None, gt=0)
    """Torch threads of a training worker; default the machine's cores shared out."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a training worker."""
    workers_on: Name | None = None
    """Machines for training workers, by their custom resource. Default any."""


class RunConfig(Section):
    """A whole run. `vas config show FILE` prints it with every default."""

    name: Name
    """The run's name; its directory is `runs_dir/name`."""
    runs_dir: str = "runs"
    """Directory or URI that holds runs."""
    seed: int = Field(0, ge=0)
    """Seed of sampling, training and the bootstrap."""
    base: Base
    """The frozen language model."""
    prompts: Prompts
    """What it is asked."""
    rewards: dict[Name, Reward] = Field(min_length=1)
    """Objective name → reward."""
    rollouts: Rollouts = Field(default_factory=Rollouts)
    """How the base model is sampled."""
    rounds: int = Field(1, gt=0)
    """Rounds of rollouts and training. In each after the first, responses begin under the guidance of the round
    before, for a random number of tokens; the base model ends them, and the value model is fitted to all rounds."""
    value: Value = Field(default_factory=Value)
    """The value model."""
    train: Train = Field(default_factory=Train)
    """How the value model is fitted."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """What is compared, and how guidance decodes."""
    resources: Resources = Field(default_factory=Resources)
    """Where the run computes."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for number, setting in enumerate(self.evaluation.strengths):
            if not any(setting.values()):
                raise ValueError("a setting of evaluation.strengths is empty or all zero; base is always compared")
            if setting in self.evaluation.strengths[:number]:
                raise ValueError(f"evaluation.strengths has {setting} twice")
            self._check_objectives(setting, "evaluation.strengths")
        for setting in self.rollouts.roll_in:
            self._check_objectives(setting, "rollouts.roll_in")
        if not self.evaluation.strengths:
            alone: list[Strengths] = [{name: beta} for name in self.rewards for beta in (2.0, 4.0, 8.0)]
            together: list[Strengths] = [dict.fromkeys(self.rewards, 4.0)] if len(self.rewards) > 1 else []
            self.evaluation.strengths = alone + together
        if self.base.openai and "engine" not in self.rollouts.model_fields_set:
            self.rollouts.engine = "openai"
        if self.rollouts.engine == "openai" and not self.base.openai:
            raise ValueError("rollouts.engine: openai needs base.openai, the server's address")
        if self.base.called and self.rollouts.engine != "openai":
            raise ValueError(
                f"rollouts.engine: {self.rollouts.engine} loads the base model's weights, and base.openai is there to "
                "do without: leave one of them out, or set base.local_weights"
            )
        sharing, gpus = self.rollouts.tensor_parallel, self.resources.gpus_per_actor
        if self.rollouts.engine == "vllm" and sharing > 1 and gpus != sharing:
            raise ValueError(
                f"rollouts.tensor_parallel is {sharing}, so resources.gpus_per_actor must be, not {gpus:g}"
            )
        most = max(self.evaluation.best_of, default=1)
        if most > self.rollouts.samples_per_prompt:
            raise ValueError(
                f"evaluation.best_of asks for {most} samples a prompt but rollouts.samples_per_prompt "
                f"is {self.rollouts.samples_per_prompt}"
            )
        return self

    def _check_objectives(self, setting: Strengths, where: str) -> None:
        for objective in setting:
            if objective not in self.rewards:
                known = nearest(objective, list(self.rewards))
                raise ValueError(f"{where} names '{objective}', which is no objective: {known}")

    def roll_in(self) -> list[Strengths]:
        """Settings of β that responses of a round after the first begin under."""
        return self.rollouts.roll_in or self.evaluation.strengths

    def backbone(self) -> tuple[str, str | None]:
        """Model and revision that the value model starts from."""
        source = self.value.backbone or self.base.model
        return source, self.base.revision if source == self.base.model else None

    def value_tokenizer(self) -> tuple[str, str | None]:
        """Tokenizer and revision that the value model reads with."""
        return self.backbone() if self.value.backbone else (self.base.tokenizer_id, self.base.revision)

    def responses(self) -> dict[str, Any]:
        """What decides the base model's own responses, but for the prompts."""
        rollouts = {"rollouts": PLACES["rollouts"] | {"roll_in"}}
        return self.model_dump(include={"base", "rollouts", "seed"}, exclude=PLACES | rollouts)

    def digest(self) -> str:
        """Hex digest of everything that decides a run's results; `resources`, `runs_dir` and PLACES don't."""
        content = self.model_dump(mode="json", exclude={"resources": True, "runs_dir": True, **PLACES})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML config and apply `a.b=c` overrides (values are YAML).

    Raises VasError for a missing file, malformed YAML, an unknown key or a bad value.
    """
    return parse_config(read_config(path, overrides), str(path))


def parse_config(content: dict[str, Any], where: str) -> RunConfig:
    """Check a config that is already a mapping; `where` names its source in errors."""
    return validated(RunConfig, content, where)
