"""Scorers of stored value models."""

from __future__ import annotations

from vas import storage
from vas.choices import Linears
from vas.decoding.scorer import InProcess, make_scorer
from vas.decoding.text_scorer import TextScorer
from vas.models.base import BaseModel, load_tokenizer
from vas.models.served import ServedModel
from vas.models.translation import Translation
from vas.models.value import ValueModel, check_tokenizers


def load_scorer(name: str, location: str, base: BaseModel | ServedModel, linears: Linears) -> InProcess:
    """The scorer of a stored value model, on the base model's device; it keeps nothing of the model that it can spare.

    Raises VasError for a checkpoint that cannot be loaded, or one that reads token ids which are not the base model's.
    """
    model = ValueModel.load(location, base.device)
    check_tokenizers(model.config, base.name, base.tokenizer_digest)
    if model.config.reads == "ids":
        return make_scorer(name, model, linears, free=True)
    with storage.local_copy(location) as folder:
        own = load_tokenizer(folder)
    translation = Translation(base.tokenizer, base.eos_token_ids, own)
    return TextScorer(name, model, translation, linears, free=True)
