"""Base models: any Hugging Face causal LM, frozen, with what decoding needs to know of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vas.digests import digest
from vas.errors import VasError
from vas.models import bundled

if TYPE_CHECKING:  # the engine runs without the libraries that these need
    from vas import config, schema


@dataclass
class BaseModel:
    """A frozen causal LM and its tokenizer."""

    name: str
    """As the config names it."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    """Tokens that end a response."""
    tokenizer_digest: str

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    @property
    def vocabulary(self) -> int:
        """How many token ids it knows."""
        return self.model.get_input_embeddings().num_embeddings

    def close(self) -> None:
        """Nothing has to be broken off."""

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model has positions for, if its config says."""
        return context_length(self.model.config)


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence a model of this config has positions for, if it says.

    With `longrope`, that is where its other factors begin: a longer sequence would change the others of its batch.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings"):
        return int(rope["original_max_position_embeddings"])
    return getattr(text, "max_position_embeddings", None)


def quieten() -> None:
    """No bars of transformers' own, for programs that show progress themselves."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else a GPU if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def set_threads(threads: int) -> None:
    """Give torch as many threads as Ray gave CPUs; more would fight over them. To be called before a model is run."""
    torch.get_num_threads()  # torch's first word with a thread would undo what was set before
    torch.set_num_threads(max(1, threads))
    # oneDNN keeps code for each shape of a product that it has met, by default for 1,024 of them: 700 MB of a replica
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def load_base(spec: config.Base, device: str | None = None) -> BaseModel:
    """Load a frozen causal LM by id, path or `bundled:` name.

    Raises VasError, one line, for a model that is not there or cannot be reached.
    """
    target = pick_device(device)
    dtype = spec.dtype if spec.dtype != "auto" else ("bfloat16" if target.type == "cuda" else "float32")
    tokenizer = load_tokenizer(spec.tokenizer_id, spec.revision)
    model = load_pretrained(AutoModelForCausalLM, spec.model, spec.revision, dtype=getattr(torch, dtype))
    model.requires_grad_(False).eval().to(target)
    return BaseModel(spec.model, model, tokenizer, _eos_token_ids(model, tokenizer), tokenizer_digest(tokenizer))


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises VasError as `load_base` does."""
    return load_pretrained(AutoTokenizer, model, revision)


def load_pretrained(auto_class: Any, model: str, revision: str | None = None, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained` with one clear line for a model that cannot be had."""
    path = bundled.resolve(model)
    try:
        return auto_class.from_pretrained(path, revision=revision or "main", **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # a quantised model needs its library
        reason = str(error).strip().splitlines()[0]
        local = os.path.sep in model and not os.path.exists(model) and model.count("/") != 1
        mend = (
            "the folder does not exist"
            if local
            else "check the id or path, and the network or HF_TOKEN if it is on the hub; "
            "`bundled:smollm2-135m-instruct` needs neither"
        )
        raise VasError(f"cannot load the model: {reason}", model, mend) from None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a vocabulary: models share token ids exactly when their digests agree."""
    return digest(*sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: schema.Prompt) -> list[int]:
    """Token ids of a prompt, ready for the response's first token.

    A chat goes through the tokenizer's chat template; without one, its contents are
    joined by blank lines. A plain string is tokenized as it is.
    """
    if not prompt.messages:
        ids = tokenizer(prompt.text).input_ids
    elif tokenizer.chat_template:
        text = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = tokenizer("\n\n".join(message["content"] for message in prompt.messages) + "\n\n").input_ids
    return list(ids)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id] if i is not None))
