"""A dry run of many prompts through the cheapest real model: a Llama of one layer, for a few tokens each.

The driver is killed at a quarter, a half and three quarters of the way. Measured: its memory all along, how long it
takes to work again, and how the cost of finding what is left grows with what is there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.rows import Row
from vas.progress import console

KILLED_AT = (0.25, 0.5, 0.75)
TOKENS, BATCH = 4, 128
SETTLED = 5.0  # seconds in which batches are those of the attempt before, whose processes outlive their driver
MIB = 2**20


def dry_run(prompts: int) -> list[Row]:
    """Run it, and check that every rollout is there once."""
    with tempfile.TemporaryDirectory(prefix="vas-million-") as name:
        folder = Path(name)
        rollouts = folder / "runs" / "million" / "rollouts" / "round=0"
        config = prepare(folder, prompts)
        batches = -(-prompts // BATCH)
        rows: list[Row] = []
        for share in (*KILLED_AT, 1.0):
            there = committed(rollouts)
            drive = Drive(config)
            drive.follow(rollouts, int(share * batches), batches)
            case = f"from {there / batches:.0%}"
            rows.append(Row(case, "until the first batch", drive.first_after, "s", "<= 30" if there else None))
            rows.append(Row(case, "driver's memory, first tenth", drive.memory(0.1) / MIB, "MiB"))
            rows.append(Row(case, "driver's memory, most", max(drive.seen) / MIB, "MiB"))
            rows.append(
                Row(case, "driver's memory, most / first tenth", max(drive.seen) / drive.memory(0.1), "x", "<= 1.1")
            )
            if drive.after:
                rows.append(Row(case, "driver's memory, summing up", max(drive.after) / MIB, "MiB"))
            console.print(
                f"{case}: {drive.first_after:.0f} s to the first batch, {committed(rollouts)} of {batches} there; "
                f"memory in MiB {drive.memory(0.1) / MIB:.0f}, at most {max(drive.seen) / MIB:.0f}"
            )
        ids = [
            each
            for file in rollouts.glob("*.parquet")
            for each in pq.read_table(file, columns=["rollout_id"])[0].to_pylist()
        ]
        rows.append(Row("rollouts", "missing or twice", prompts - len(set(ids)) + len(ids) - len(set(ids)), "", "== 0"))
        first, *_, last = (row.value for row in rows if row.metric == "until the first batch" and row.goal)
        rows.append(Row("first batch, from 75 % / from 25 %", "ratio", last / first, "x", "<= 3"))
        return rows


def prepare(folder: Path, prompts: int) -> Path:
    """Model, prompts and config; returns the config's file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<eos>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    ends = {"bos_token_id": None, "eos_token_id": 0}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer.get_vocab()), max_position_embeddings=128, **shape, **ends)
    )
    model.save_pretrained(folder / "model")
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"What is {number}?"}) + "\n" for number in range(prompts))
    content = {
        "name": "million",
        "runs_dir": str(folder / "runs"),
        "base": {"model": str(folder / "model")},
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "rewards": {"length": {"use": "length"}},
        "rollouts": {"samples_per_prompt": 1, "batch_size": BATCH, "sampling": {"max_tokens": TOKENS}},
        "evaluation": {"best_of": []},
    }
    file = folder / "million.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def committed(rollouts: Path) -> int:
    """Committed batches, counted at little cost: it is done again and again beside what is measured."""
    with suppress(FileNotFoundError):
        return sum(entry.name.endswith(".parquet") and entry.name[0] not in "._" for entry in os.scandir(rollouts))
    return 0


@dataclass
class Drive:
    """One attempt: `vas rollout` in a process of its own, watched from outside."""

    config: Path
    first_after: float = 0.0
    """Seconds from its start to the first batch that it committed."""
    seen: list[int] = field(default_factory=list)
    """Its resident memory, in bytes, once a second from the first batch to the last."""
    after: list[int] = field(default_factory=list)
    """The same from then on, when it sums up."""

    def follow(self, rollouts: Path, until: int, batches: int) -> None:
        """Watch it until so many batches are committed, then kill it; or to its end, if that is all of them."""
        started, there = time.monotonic(), 0
        process = subprocess.Popen(
            [sys.executable, "-m", "vas.cli.main", "rollout", str(self.config)], start_new_session=True
        )
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            now = committed(rollouts)
            if time.monotonic() - started < SETTLED:
                there = now
            if now > there:
                self.first_after = self.first_after or time.monotonic() - started
                (self.seen if now < batches else self.after).append(driver.memory_info().rss)
            if batches > until <= now:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return
            time.sleep(1.0 if self.first_after else 0.2)
        if until < batches or process.returncode:
            raise RuntimeError(f"it ended with {process.returncode}")

    def memory(self, share: float) -> float:
        """Most memory in the first `share` of the attempt."""
        return float(max(self.seen[: max(1, int(share * len(self.seen)))]))
