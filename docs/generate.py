"""Writes docs/config.md, docs/serving-config.md and docs/cli.md from the code they describe.

    python docs/generate.py

tests/test_docs.py fails while what lies in docs/ is not what this writes.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from vas.cli.main import app  # noqa: E402  (it is this checkout that is described)
from vas.config import RunConfig  # noqa: E402  (of this checkout, too)
from vas.serving.config import Serving  # noqa: E402  (of this checkout, too)

NOTE = "<!-- Written by docs/generate.py; change the code and run it again. -->"

CONFIG_INTRO = """\
# The config

A run is one YAML file. `vas config show FILE` prints it with every default spelled out, and
`vas config check FILE` checks it, its model, its prompts and its rewards before anything runs.
[configs/demo.yaml](../configs/demo.yaml) is an example.

- An unknown key is an error that names the nearest right one.
- `--set KEY=VALUE` overrides a key, with dots between the levels: `--set train.lr=1e-4`,
  `--set rewards.brief.params.limit=20`, `--set "evaluation.best_of=[2, 4]"`. The value is YAML.
- Every number must be finite.
- The digest in `run.json` identifies a run. It covers every key but `resources` and `runs_dir`,
  `rollouts.tensor_parallel`, and of `base` the keys `openai`, `api_key_env`, `concurrency`, `timeout`,
  `attempts`, `most_calls` and `most_tokens`: those say where a run computes and lies, and may change between two calls.
  With any other change the run is another run, and needs another `name`.
"""

CLI_INTRO = """\
# The command line

`vas COMMAND --help` says the same. What `generate`, `rewards` and `config show` print goes to
standard output; progress, tables and errors go to standard error. A command exits with 0 when it
did its work, with 2 when something you can mend stopped it (one block says what, where, and the
mend), and with 130 after Ctrl-C.
"""


SERVING_INTRO = """\
# The endpoint's config

What `vas serve FILE` reads, and what `args` of the application are in a file for `serve deploy`; `vas serve RUN` has
the defaults below, with the run as its `run`. [serving.md](serving.md) says what to do with it. `--set KEY=VALUE`
overrides a key, as for a run.
"""


def config_page() -> str:
    """docs/config.md: the keys of a run."""
    return _keys_page(RunConfig, CONFIG_INTRO)


def serving_page() -> str:
    """docs/serving-config.md: the keys of an endpoint."""
    return _keys_page(Serving, SERVING_INTRO)


def _keys_page(root: type[BaseModel], intro: str) -> str:
    """A table a section, a row a key."""
    lines = [NOTE, "", intro]
    for path, section in _sections(root, ""):
        lines += [f"## `{path}`" if path else "## Top level", ""]
        if section.__doc__ and path:
            lines += [_sentence(section.__doc__), ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for name, field in section.model_fields.items():
            meaning = _cell(field.description or "")
            lines.append(f"| `{name}` | {_cell(_type(field.annotation))} | {_default(field)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def cli_page() -> str:
    """docs/cli.md: a section a command."""
    lines = [NOTE, "", CLI_INTRO]
    for name, command in _commands(typer.main.get_command(app), "vas"):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join([name, "[OPTIONS]" if options else "", *map(_metavar, arguments)])
        lines += [f"## `{name}`", "", f"    {' '.join(usage.split())}", "", *_paragraphs(command.help)]
        if arguments or options:
            lines += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
            lines += [_parameter(parameter) for parameter in [*arguments, *options]]
            lines.append("")
        lines += _paragraphs(command.epilog)
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Every generated file with its content."""
    made = {"config": config_page(), "serving-config": serving_page(), "cli": cli_page()}
    return {DOCS / f"{name}.md": text.rstrip("\n") + "\n" for name, text in made.items()}


def _sections(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and those inside it, each with its dotted path."""
    yield path, section
    for name, field in section.model_fields.items():
        child = _child(field)
        if child is not None:
            entry = "OBJECTIVE" if name == "rewards" else "NAME"
            part = f"{name}.{entry}" if get_origin(field.annotation) is dict else name
            yield from _sections(child, f"{path}.{part}" if path else part)


def _child(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, if it holds one."""
    kinds = [field.annotation]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        kinds += get_args(kind)
    return None


def _type(kind: Any) -> str:
    """A type in words that YAML's users know."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each) for each in inside)
    if origin is list:
        return f"list of {_type(inside[0])}"
    if origin is tuple:
        return f"list of {len(inside)}: {', '.join(map(_type, inside))}"
    if origin is dict:
        return f"mapping of {_type(inside[0])} to {_type(inside[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "any"}
    return names[kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "all defaults" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    if not hasattr(command, "commands"):
        yield name, command
    for word, each in getattr(command, "commands", {}).items():
        yield from _commands(each, f"{name} {word}")


def _parameter(parameter: Any) -> str:
    named = parameter.param_type_name == "option"
    metavar = "" if getattr(parameter, "is_flag", False) else f" {_metavar(parameter)}"
    what = ", ".join(sorted(parameter.opts, key=len, reverse=True)) + metavar if named else _metavar(parameter)
    shown = not parameter.required and parameter.default is not None and not isinstance(parameter.default, bool)
    default = "required" if parameter.required else f"`{parameter.default}`" if shown else ""
    return f"| `{_cell(what)}` | {default} | {_cell(parameter.help or '')} |"


def _metavar(parameter: Any) -> str:
    """What stands for the value; the options that name none take a number."""
    return parameter.metavar or ("NUMBER" if parameter.param_type_name == "option" else parameter.name.upper())


def _paragraphs(text: str | None) -> list[str]:
    return [*(" ".join(part.split()) + "\n" for part in (text or "").split("\n\n") if part.strip())]


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    """Text that keeps to one cell of a table."""
    return _sentence(text).replace("|", "\\|")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(path)
