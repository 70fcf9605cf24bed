"""The value model: a backbone with a head per objective, as a Hugging Face model."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vas.errors import VasError
from vas.models.base import context_length, load_pretrained, tokenizer_digest
from vas.models.heads import CategoricalHead, Head, ScalarHead, StateHead, VocabHead

if TYPE_CHECKING:
    from vas import config


class ValueModelConfig(PreTrainedConfig):
    """What a value-model checkpoint says of itself (config.json).

    backbone: the backbone's own config. objectives: one dict each with `name`, `mean`, `std`
    (of the training rollouts' rewards), `low`, `high` (range of the standardised reward)
    and `reward_version`. head: `{"kind", "bins", "label"}`; `vocab` needs the kind alone. reads: `ids`
    of the base model's tokenizer, or `text` in tokens of its own.
    """

    model_type = "vas_value"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        objectives: list[dict[str, Any]] | None = None,
        head: dict[str, Any] | None = None,
        tokenizer_digest: str = "",
        base_model: str = "",
        td_lambda: float = 1.0,
        run_digest: str = "",
        reads: str = "ids",
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.objectives = objectives or []
        self.head = head or {"kind": "categorical", "bins": 41, "label": "hl_gauss"}
        self.tokenizer_digest = tokenizer_digest
        self.base_model = base_model
        self.td_lambda = td_lambda
        self.run_digest = run_digest
        self.reads = reads
        super().__init__(**kwargs)

    @classmethod
    def load(cls, location: str) -> ValueModelConfig:
        """Read a checkpoint's config.json from a local path or a URI."""
        from vas import storage  # needs pyarrow, which a model at hand does without

        return cls(**json.loads(storage.read_bytes(storage.join(location, "config.json"))))

    @property
    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's config as an object."""
        return AutoConfig.for_model(**self.backbone)

    @property
    def context_length(self) -> int | None:
        """Longest sequence it has positions for, if the backbone's config says."""
        return context_length(self.backbone_config)


class ValueModel(PreTrainedModel):
    """V_j(s): the standardised reward j that the base model's rollout will get from token prefix s.

    The state of position t is the prefix that ends with token t. Values are in standard
    deviations of each reward; `config.objectives` has the mean and std to go back.
    """

    config_class = ValueModelConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True

    def __init__(self, config: ValueModelConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        width = config.backbone_config.get_text_config().hidden_size
        self.heads = nn.ModuleList(_make_head(config.head, objective, width) for objective in config.objectives)
        self.post_init()

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the heads, in order."""
        return tuple(objective["name"] for objective in self.config.objectives)

    def _init_weights(self, module: nn.Module) -> None:
        """Only heads are ever fresh."""
        if isinstance(module, Head):
            module.reset()
        if isinstance(module, CategoricalHead):  # transformers builds models on the meta device
            centers = torch.linspace(module.low, module.high, module.bins)
            module.centers.copy_(centers)

    def reset_heads(self) -> None:
        """Start at value 0 everywhere."""
        for head in self.heads:
            cast(Head, head).reset()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    def hidden(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """The backbone's last hidden states [B, T, H]; keyword arguments go to the backbone."""
        return self.backbone(input_ids=input_ids, **kwargs).last_hidden_state

    def outputs(self, hidden: Tensor) -> list[Tensor]:
        """Every head's raw output for hidden states [..., H]."""
        return [cast(Head, head)(hidden) for head in self.heads]

    def values(self, outputs: Sequence[Tensor], strengths: Tensor | None = None) -> Tensor:
        """Values [..., J] from the heads' outputs; soft values where `strengths` [..., J] is given."""
        assert not self.scores_vocabulary, "a vocab head has no value of the state itself"
        heads = cast(Sequence[StateHead], self.heads)
        if strengths is None:
            return torch.stack([h.value(o) for h, o in zip(heads, outputs, strict=True)], dim=-1)
        each = [h.soft_value(o, strengths[..., j]) for j, (h, o) in enumerate(zip(heads, outputs, strict=True))]
        return torch.stack(each, dim=-1)

    @property
    def scores_vocabulary(self) -> bool:
        """Whether the heads score next tokens from their parent state."""
        return self.config.head["kind"] == "vocab"

    def next_values(self, outputs: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Values [..., K, J] of next tokens [..., K], from vocab heads' outputs of the parent states."""
        heads = cast(Sequence[VocabHead], self.heads)
        embedded = self.get_input_embeddings()(tokens)
        return torch.stack([h.values(o, embedded) for h, o in zip(heads, outputs, strict=True)], dim=-1)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Values [B, T, J] of every prefix of `input_ids` [B, T]."""
        return self.values(self.outputs(self.hidden(input_ids, **kwargs)))

    @classmethod
    def build(
        cls,
        spec: config.Value,
        base: config.Base,
        tokenizer: PreTrainedTokenizerBase,
        objectives: list[dict[str, Any]],
        **about: Any,
    ) -> ValueModel:
        """A fresh value model: the backbone's pretrained weights (its first L layers), heads at zero.

        Its backbone is frozen if it extends another value model; with LoRA, only adapters are not.
        """
        head = head_spec(spec)
        if spec.extends is not None:
            return cls._extension(spec.extends, tokenizer, objectives, head, **about)
        source = spec.backbone or base.model
        revision = base.revision if source == base.model else None  # as RunConfig.backbone
        full = load_pretrained(AutoConfig, source, revision).get_text_config()
        layers = spec.layers or full.num_hidden_layers
        if layers > full.num_hidden_layers:
            raise VasError(
                f"the backbone has {full.num_hidden_layers} layers, fewer than {layers}",
                f"value.layers: {layers}",
            )
        pretrained = load_pretrained(AutoModelForCausalLM, source, revision, dtype=torch.float32)
        backbone = full.to_dict() | {
            "dtype": "float32",
            "num_hidden_layers": layers,
            full.attribute_map.get("num_hidden_layers", "num_hidden_layers"): layers,
        }
        if backbone.get("layer_types"):
            backbone["layer_types"] = backbone["layer_types"][:layers]
        model = cls(
            ValueModelConfig(
                backbone=backbone,
                objectives=objectives,
                head=head,
                tokenizer_digest=tokenizer_digest(tokenizer),
                base_model=base.model,
                **about,
            )
        )
        missing, _ = model.backbone.load_state_dict(pretrained.base_model.state_dict(), strict=False)
        assert not missing, f"the backbone lacks {missing}"
        model.reset_heads()
        model = model.float()
        if spec.lora is not None:
            model.backbone = _with_adapters(model.backbone, spec.lora)
        return model

    @classmethod
    def _extension(
        cls,
        location: str,
        tokenizer: PreTrainedTokenizerBase,
        objectives: list[dict[str, Any]],
        head: dict[str, Any],
        **about: Any,
    ) -> ValueModel:
        """New heads on the backbone of another value model, which stays as it is."""
        old = cls.load(location)
        check_extension(old.config, location, [objective["name"] for objective in objectives], head)
        check_tokenizers(old.config, str(about.get("base_model", "of this run")), tokenizer_digest(tokenizer))
        model = cls(ValueModelConfig(**(old.config.to_dict() | {"objectives": objectives} | about)))
        model.backbone = old.backbone
        model.reset_heads()
        return model.float()

    def finished(self, spec: config.Value, state: dict[str, Tensor]) -> ValueModel:
        """What a checkpoint holds: this model with weights `state`, adapters merged in, and the heads it extends."""
        model = ValueModel(copy.deepcopy(self.config)).float()  # it may get more objectives; training goes on
        if spec.lora is not None:
            model.backbone = _with_adapters(model.backbone, spec.lora)
        model.load_state_dict(state)
        if spec.lora is not None:
            model.backbone = cast(Any, model.backbone).merge_and_unload()
        if spec.extends is not None:
            old = ValueModel.load(spec.extends)
            model.config.objectives = old.config.objectives + model.config.objectives
            model.heads = nn.ModuleList([*old.heads, *model.heads])
        return model

    @classmethod
    def from_pretrained(cls, location: Any, *args: Any, **kwargs: Any) -> ValueModel:
        """As transformers' own: a local path or a hub id; and a URI such as `s3://` too."""
        from vas import storage

        with storage.local_copy(str(location)) as folder:
            return super().from_pretrained(folder, *args, **kwargs)

    @classmethod
    def load(cls, location: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> ValueModel:
        """Load a checkpoint ready to score, frozen and on its device.

        Raises VasError if there is no value model there.
        """
        from vas import storage

        with storage.local_copy(location) as folder:
            try:
                kind = AutoConfig.from_pretrained(folder).model_type
                if kind != cls.config_class.model_type:
                    raise ValueError(f"what is there is a model of type {kind}")
                model = cls.from_pretrained(folder, dtype=dtype or torch.float32)
            except (OSError, ValueError, SafetensorError) as error:
                raise VasError(
                    f"cannot load a value model: {str(error).splitlines()[0]}",
                    location,
                    "give the folder that holds its config.json, e.g. runs/NAME/value/default",
                ) from None
        return model.requires_grad_(False).eval().to(device or torch.device("cpu"))

    def save(
        self,
        location: str,
        tokenizer: PreTrainedTokenizerBase,
        card: str,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        """Write the checkpoint contract: config, safetensors, tokenizer, model card; and training.json, its history."""
        from vas import storage

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (Path(folder) / "README.md").write_text(card)
            (Path(folder) / "training.json").write_text(json.dumps(history or []))
            storage.copy_directory(folder, location)


def _make_head(spec: dict[str, Any], objective: dict[str, Any], width: int) -> Head:
    if spec["kind"] == "scalar":
        return ScalarHead(width)
    if spec["kind"] == "vocab":
        return VocabHead(width)
    return CategoricalHead(width, spec["bins"], objective["low"], objective["high"], spec["label"])


def head_spec(spec: config.Value) -> dict[str, Any]:
    """What a checkpoint says of the heads that a config asks for."""
    return {"kind": spec.head, "bins": spec.bins, "label": spec.label}


def _with_adapters(backbone: nn.Module, lora: config.Lora) -> Any:
    """The backbone, frozen, with low-rank adapters (arXiv:2106.09685) to train."""
    import peft  # not needed to load or run a value model

    return peft.get_peft_model(
        cast(PreTrainedModel, backbone),
        peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets),
    )


def check_extension(old: ValueModelConfig, location: str, objectives: Sequence[str], head: dict[str, Any]) -> None:
    """Whether heads for some objectives can be added to a value model. Raises VasError if not."""
    where = f"value.extends: {location}"
    for objective in old.objectives:
        if objective["name"] in objectives:
            raise VasError(
                f"the value model has the objective '{objective['name']}' already",
                where,
                "take it out of the run's rewards",
            )
    if old.reads != "ids":
        raise VasError("a value model that reads text cannot get more heads", where, "train one of its own")
    if old.head != head:
        raise VasError(
            f"the value model's heads are {old.head}, this run's would be {head}",
            where,
            "set value.head, value.bins and value.label to be the same",
        )


def check_tokenizers(config: ValueModelConfig, base_name: str, base_digest: str) -> None:
    """Guidance by token id needs one vocabulary. Raises VasError that names both models otherwise.

    A value model that was trained on text has a tokenizer of its own.
    """
    if config.reads == "ids" and config.tokenizer_digest != base_digest:
        raise VasError(
            "the value model and the base model have different tokenizers, so token ids mean different things",
            f"value model of {config.base_model} ({config.tokenizer_digest}), base model {base_name} ({base_digest})",
            "train a value model on this base model's rollouts; its backbone may have any tokenizer",
        )


AutoConfig.register("vas_value", ValueModelConfig, exist_ok=True)
AutoModel.register(ValueModelConfig, ValueModel, exist_ok=True)
