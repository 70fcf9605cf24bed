"""`hf:MODEL`: a Hugging Face sequence classifier, such as a preference reward model, as a reward."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vas.errors import VasError, nearest
from vas.rewards.params import Params, params_digest
from vas.schema import Message, Prompt

Encoding = dict[str, list[int]]


class HfParams(Params):
    """What the config's `params` may say."""

    label: int | str | None = None
    """Output to read, by index or name; default the only one, or the last."""
    transform: Literal["logit", "probability"] = "logit"
    """`probability`: softmax over the labels; sigmoid for a single or multi-label output."""
    reads: Literal["conversation", "response"] = "conversation"
    """`response` hides the prompt, as a plain sentiment or toxicity classifier expects."""
    max_length: int | None = Field(None, gt=0)
    """Tokens read; a longer text loses its beginning. Default what the model takes."""
    batch_size: int = Field(16, gt=0)
    """Texts per forward pass."""
    device: str = "auto"
    """`auto` (CUDA when there is any), `cpu`, `cuda`, `cuda:1` …"""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


class HfReward:
    """A sequence classifier as a reward: a logit (any real number) or a probability (0 to 1).

    The tokenizer's chat template renders prompt and response where it has one (a plain-string
    prompt counts as a user message). Otherwise they are a text pair for a tokenizer with a
    separator token (BERT and kin), and one text, prompt first, for any other.

    On a CPU it computes in float32, on a GPU in the type the checkpoint is stored in. Torch's
    threads are left to the caller.
    """

    def __init__(self, model: str, params: Mapping[str, Any], where: str) -> None:
        """Reads config and tokenizer, so that a missing model is a VasError here; weights come later."""
        self.name = model
        self.where = f"{where}.use"
        self.params = HfParams.parse(params, where)
        self.config, self.tokenizer = self._read_config()
        self.label = _label_index(self.params.label, self.config.id2label, f"{where}.params.label")

    @cached_property
    def version(self) -> str:
        """Model, commit (digest of the files of a local folder), digest of the params that count."""
        folder = Path(self.name)
        commit = getattr(self.config, "_commit_hash", None) or self.params.revision
        known = f"files={_folder_digest(folder)}" if folder.is_dir() else f"revision={commit or 'unknown'}"
        counted = self.params.model_dump(exclude={"batch_size", "device", "revision"})
        return f"hf:{self.name} {known} params={params_digest({**counted, 'label': self.label})}"

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """N rewards. Texts are batched by length; raises ValueError for a text without a token."""
        import torch

        encodings = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        order = sorted(range(len(encodings)), key=lambda row: -len(encodings[row]["input_ids"]))
        rewards = [0.0] * len(encodings)
        with torch.inference_mode():
            for start in range(0, len(order), self.params.batch_size):
                rows = order[start : start + self.params.batch_size]
                scores = self._forward([encodings[row] for row in rows])
                for row, value in zip(rows, scores, strict=True):
                    rewards[row] = value
        return rewards

    def _forward(self, encodings: list[Encoding]) -> list[float]:
        import torch

        pad = self._own_pad_token
        if pad is None:
            pad = self._free_pad_token(encodings)
            # A decoder finds the last token of a row by comparing with this.
            self._model.config.get_text_config().pad_token_id = pad
        longest = max(len(encoding["input_ids"]) for encoding in encodings)
        inputs = {
            key: torch.tensor(
                [e[key] + [pad if key == "input_ids" else 0] * (longest - len(e[key])) for e in encodings],
                device=self._model.device,
            )
            for key in encodings[0]
        }
        logits_BL = self._model(**inputs).logits.float()
        if self.params.transform == "probability":
            independent = logits_BL.shape[1] == 1 or self.config.problem_type == "multi_label_classification"
            logits_BL = logits_BL.sigmoid() if independent else logits_BL.softmax(-1)
        return logits_BL[:, self.label].tolist()

    @property
    def _own_pad_token(self) -> int | None:
        """The padding token that the model's config names."""
        token = self.config.get_text_config().pad_token_id
        return None if token is None or token < 0 else token

    def _free_pad_token(self, encodings: list[Encoding]) -> int:
        """The tokenizer's padding token, else EOS, but never a token that a row ends with.

        Decoder classifiers read the last token that is no padding, and would read the one before it.
        """
        last = {encoding["input_ids"][-1] for encoding in encodings}
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token not in last:
                return token
        return next(token for token in range(len(last) + 1) if token not in last)

    def _encode(self, prompt: Prompt, response: str) -> Encoding:
        """Token ids (and token types, where the tokenizer has them) of one row; no padding."""
        first, second, special = self._texts(prompt, response)
        encoding = self.tokenizer(
            first,
            second,
            add_special_tokens=special,
            truncation=True,
            max_length=self._max_length,
            return_attention_mask=True,
        )
        if not encoding["input_ids"]:
            raise ValueError("nothing to score: prompt and response have no token")
        return dict(encoding)

    def _texts(self, prompt: Prompt, response: str) -> tuple[str, str | None, bool]:
        """(text, second text of a pair, whether the tokenizer is to add its special tokens)."""
        if self.params.reads == "response":
            return response, None, True
        messages: list[Message] = [*prompt.messages] or [{"role": "user", "content": prompt.text}]
        if self.tokenizer.chat_template:
            messages = [*messages, {"role": "assistant", "content": response}]
            return self.tokenizer.apply_chat_template(messages, tokenize=False), None, False
        if len(messages) == 1:
            asked = messages[0]["content"]
        else:
            asked = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        if self.tokenizer.sep_token_id is not None:
            return asked, response, True
        return asked + ("\n" if prompt.messages else "") + response, None, True

    @cached_property
    def _max_length(self) -> int | None:
        """The shortest of what the config asks for, the tokenizer allows and the model has positions for."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        limits = [self.params.max_length, self.tokenizer.model_max_length, positions]
        unknown = 10**9  # transformers writes 10**30 where nobody said
        given = [limit for limit in limits if limit and 0 < limit < unknown]
        return min(given, default=None)

    def _read_config(self) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoTokenizer

        with _reading(self.name, self.where):
            config = AutoConfig.from_pretrained(self.name, revision=self.params.revision)
            tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.params.revision, truncation_side="left")
        return config, tokenizer

    @cached_property
    def _model(self) -> Any:
        import torch
        from transformers import AutoModelForSequenceClassification

        device = self.params.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with _reading(self.name, self.where):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                revision=self.params.revision,
                dtype=torch.float32 if device == "cpu" else "auto",
                output_loading_info=True,
            )
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise VasError(
                f"'{self.name}' lacks weights of a sequence classifier: {min(report['missing_keys'])}",
                self.where,
                "name a model that was trained as a classifier or reward model",
            )
        return model.to(device).eval()


@contextmanager
def _reading(model: str, where: str) -> Iterator[None]:
    """Turns what can go wrong while reading a model into one VasError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (OSError, ValueError, ImportError, HfHubHTTPError) as error:
        raise VasError(
            f"cannot load the reward model '{model}': {str(error).strip().partition(chr(10))[0]}",
            where,
            "check the name and the network; a local folder with config.json and a tokenizer works offline",
        ) from None


def _label_index(label: int | str | None, names: Mapping[int, str], where: str) -> int:
    """Index of the logit to read."""
    if label is None:
        return len(names) - 1
    if isinstance(label, int):
        if not 0 <= label < len(names):
            raise VasError(f"there is no label {label}", where, f"the model has 0 to {len(names) - 1}")
        return label
    for index, name in names.items():
        if name == label:
            return int(index)
    raise VasError(f"the model has no label '{label}'", where, nearest(label, list(names.values())))


def _folder_digest(folder: Path) -> str:
    """Digest of the files in a model's folder, names and contents; texts about the model don't count."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".md":
            with path.open("rb") as file:
                total.update(f"{path.name}\x1f{hashlib.file_digest(file, 'sha256').hexdigest()}\x1f".encode())
    return total.hexdigest()[:16]
