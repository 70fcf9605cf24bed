"""How fast the engine decodes, against Hugging Face `generate` and the authors' recipe for VAS.

    make bench            or            python benchmarks/decoding.py --json FILE [--quick]

The base is the bundled 135M model; the value model is its first ten layers with a random
head (speed does not depend on what it has learned). All cases run in this one process, on the
same prompts and threads, so their ratios can be compared; absolute figures are this machine's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.reference import one_at_a_time
from vas.config import Base, Prompts, Value
from vas.decoding.engine import Engine
from vas.decoding.scorer import ValueScorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.models.base import BaseModel, encode_prompt, load_base
from vas.models.value import ValueModel
from vas.progress import console
from vas.prompts import load_prompts

BASE = Base(model="bundled:smollm2-135m-instruct")
NEW_TOKENS, CANDIDATES, LAYERS = 32, 20, 10
MASS = 0.9  # of adaptive k
QUEUED = 4  # requests of mixed lengths (geometric, mean NEW_TOKENS) for each place of the batch


def timed(run: Callable[[], int]) -> float:
    """Tokens per second of a run that returns how many it made."""
    started = time.perf_counter()
    return run() / (time.perf_counter() - started)


def hugging_face(base: BaseModel, requests: list[Request]) -> int:
    """`generate`, padded on the left, with sampling."""
    longest = max(len(r.prompt_token_ids) for r in requests)
    new_tokens = max(r.sampling.max_tokens for r in requests)
    pad = base.tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests])
    mask = torch.tensor([[0] * (longest - len(r.prompt_token_ids)) + [1] * len(r.prompt_token_ids) for r in requests])
    with torch.inference_mode():
        out = base.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=pad,
        )
    assert out.shape[1] == longest + new_tokens
    return sum(r.sampling.max_tokens for r in requests)  # what nobody asked for doesn't count


def in_batches(base: BaseModel, requests: list[Request], batch: int) -> int:
    """A queue through `generate`, a batch at a time: each runs as long as its longest request."""
    return sum(hugging_face(base, requests[i : i + batch]) for i in range(0, len(requests), batch))


def engine(base: BaseModel, requests: list[Request], value: ValueModel | None = None, batch: int | None = None) -> int:
    """The engine, guided when there is a value model; `batch` sequences at once, by default all."""
    scorers = [ValueScorer("value", value)] if value is not None else []
    return sum(len(c.token_ids) for c in Engine(base, scorers, batch or len(requests)).generate(requests))


def random_value_model(base: BaseModel) -> ValueModel:
    """The base's first layers, with a random head."""
    objective = {"name": "any", "mean": 0.0, "std": 1.0, "low": -3.0, "high": 3.0, "reward_version": "random"}
    model = ValueModel.build(Value(layers=LAYERS, head="scalar"), BASE, base.tokenizer, [objective])
    torch.nn.init.normal_(model.heads[0].linear.weight, std=0.02)
    return model.requires_grad_(False).eval()


def measure(batches: list[int], threads: int) -> list[dict[str, Any]]:
    """Every case at every batch size, as benchmark rows."""
    torch.set_num_threads(threads)
    base = load_base(BASE)
    base.eos_token_ids = ()  # every case makes the same number of tokens
    value = random_value_model(base)
    prompts = [tuple(encode_prompt(base.tokenizer, p)) for p in load_prompts(Prompts(source="bundled:demo"))]
    rows = []
    for batch in batches:
        sampling = [SamplingParams(max_tokens=NEW_TOKENS, seed=i) for i in range(batch)]
        plain = [Request(str(i), prompts[i], s) for i, s in enumerate(sampling)]
        guided = [
            Request(r.request_id, r.prompt_token_ids, r.sampling, GuidanceParams({"any": 2.0}, CANDIDATES))
            for r in plain
        ]
        adaptive = [replace(r, guidance=replace(r.guidance, candidate_mass=MASS)) for r in guided]
        queue = [
            Request(str(i), prompts[i], SamplingParams(max_tokens=length, seed=i))
            for i, length in enumerate(np.random.default_rng(0).geometric(1 / NEW_TOKENS, QUEUED * batch).tolist())
        ]
        few = guided[: min(batch, 2)]  # one sequence at a time: its rate does not depend on the batch
        engine(base, plain), engine(base, guided, value)  # warm up
        figures = {
            "generate": timed(lambda r=plain: hugging_face(base, r)),
            "engine": timed(lambda r=plain: engine(base, r)),
            "reference guided": timed(lambda r=few: sum(len(one_at_a_time(base, value, one)) for one in r)),
            "engine guided": timed(lambda r=guided: engine(base, r, value)),
            "engine guided, adaptive k": timed(lambda r=adaptive: engine(base, r, value)),
        }
        if batch > 1:
            figures["generate, mixed lengths"] = timed(lambda r=queue, b=batch: in_batches(base, r, b))
            figures["engine, mixed lengths"] = timed(lambda r=queue, b=batch: engine(base, r, batch=b))
        goal = {1: ">= 3", 32: ">= 8"}.get(batch)
        rows += [_row(batch, name, "throughput", rate, "tokens/s") for name, rate in figures.items()]
        rows += [
            _row(batch, "engine / generate", "ratio", figures["engine"] / figures["generate"], "x", ">= 1.0"),
            _row(
                batch, "guided / reference", "ratio", figures["engine guided"] / figures["reference guided"], "x", goal
            ),
            _row(batch, "guided / unguided", "ratio", figures["engine guided"] / figures["engine"], "x"),
            _row(
                batch,
                "adaptive k / generate",
                "ratio",
                figures["engine guided, adaptive k"] / figures["generate"],
                "x",
                ">= 1.0" if batch > 1 else None,
            ),
        ]
        if batch > 1:
            mixed = figures["engine, mixed lengths"] / figures["generate, mixed lengths"]
            rows.append(_row(batch, "mixed: engine / generate", "ratio", mixed, "x", ">= 1.5"))
    return rows


def _row(batch: int, case: str, metric: str, value: float, unit: str, goal: str | None = None) -> dict[str, Any]:
    return {"case": f"batch {batch}: {case}", "metric": metric, "value": round(value, 3), "unit": unit, "goal": goal}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="batch 1 and 8 only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args()
    rows = measure([1, 8] if options.quick else [1, 8, 32], options.threads)
    for row in rows:
        console.print(f"{row['case']:<38} {row['value']:>9.2f} {row['unit']:<9} {row['goal'] or ''}", highlight=False)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
