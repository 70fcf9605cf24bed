"""Config files: sections of typed keys, YAML, `--set` overrides, and errors that name the key and its nearest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vas.errors import VasError, nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """Keys of a config, each with a type, a default and a meaning; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def yaml(self) -> str:
        """As YAML, every default spelled out."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


S = TypeVar("S", bound=Section)


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML config as a mapping, with `a.b=c` overrides applied (values are YAML).

    Raises VasError for a missing file or malformed YAML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise VasError(
            f"cannot read the config: {error.strerror}", str(path), "check the path; configs/ has examples"
        ) from None
    except UnicodeDecodeError as error:
        raise VasError(
            f"the config is not UTF-8 text: {error.reason} at byte {error.start}", str(path), "save it as UTF-8"
        ) from None
    content = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise VasError("the config must be a mapping of sections", str(path), "see configs/demo.yaml")
    return override(content, overrides)


def read_yaml(text: str, where: str) -> Any:
    """What YAML says; `where` names its source in the VasError that is raised if it is malformed."""
    try:
        return _read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that there is not
        raise VasError(f"the config is not valid YAML: {_one_line(error)}", where) from None


def override(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` overrides to a config that is a mapping (changed in place). Raises VasError."""
    for text in overrides:
        _apply(content, text)
    return content


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` merged into it, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def validated(kind: type[S], content: dict[str, Any], where: str) -> S:
    """Check a config that is already a mapping; `where` names its source in errors. Raises VasError."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        mistakes = [_explain(item, kind) for item in error.errors()]
        if len(mistakes) == 1:
            raise VasError(f"the config has a mistake: {mistakes[0]}", where) from None
        listed = "".join(f"\n  - {mistake}" for mistake in mistakes)
        raise VasError(f"the config has {len(mistakes)} mistakes:{listed}", where) from None


def _apply(content: dict[str, Any], override_: str) -> None:
    """Set one dotted key of `content` in place."""
    dotted, separator, text = override_.partition("=")
    if not separator or not dotted:
        raise VasError("an override must read key=value", f"--set {override_}", "e.g. --set train.lr=1e-4")
    try:
        value = _read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise VasError(f"the override's value is not valid YAML: {_one_line(error)}", f"--set {override_}") from None
    *parents, last = dotted.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise VasError(f"'{parent}' is a value, not a section", f"--set {override_}")
    content[last] = value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; people mean the number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for a number."""


_EXPONENT = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(item: Any, kind: type[BaseModel]) -> str:
    """One pydantic error as `key: what is wrong`, with the nearest key for an unknown one."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key, {nearest(str(item['loc'][-1]), _keys_of(item['loc'][:-1], kind))}"
    if item["type"] == "missing":
        return f"{key}: this key is required"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _keys_of(location: tuple[Any, ...], section: type[BaseModel]) -> list[str]:
    """The keys allowed in the section at `location`."""
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None:  # the name of an entry in a mapping of sections: rewards.NAME
            continue
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return list(section.model_fields)
