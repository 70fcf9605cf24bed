"""Keyword arguments of a reward, checked before anything is scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vas.digests import digest
from vas.errors import VasError, nearest


class Params(BaseModel):
    """Base of everything that is made from a config's `params`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, params: Mapping[str, Any], where: str) -> Self:
        """Check `params`; `where` is the config key they come from. Raises VasError."""
        try:
            return cls.model_validate(dict(params))
        except ValidationError as error:
            mistakes = "; ".join(_explain(item, list(cls.model_fields)) for item in error.errors())
            raise VasError(f"wrong reward params: {mistakes}", f"{where}.params") from None


def unknown_param(name: str, known: list[str]) -> str:
    """The sentence for a parameter that does not exist."""
    return f"'{name}' is no param of this reward, {nearest(name, known) if known else 'it takes none'}"


def params_digest(params: Mapping[str, Any]) -> str:
    """Hex digest of parameter values, whatever their order."""
    return digest(json.dumps(dict(params), sort_keys=True, default=str))


def _explain(item: Any, known: list[str]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return unknown_param(name, known)
    if item["type"] == "missing":
        return f"'{name}' is required"
    return f"'{name}': {item['msg'].removeprefix('Value error, ')}"
