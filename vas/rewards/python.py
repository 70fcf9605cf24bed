"""`python:module.function` and `python:path/to/file.py:function`: rewards of one's own.

The function is called as `function(prompts, responses, **params)` with N prompts
(vas.schema.Prompt) and N response texts, and returns N numbers. It comes from the run's own
config and is code that runs here: nothing that a client sends ever gets to this module.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vas.errors import VasError, nearest
from vas.rewards.params import params_digest, unknown_param
from vas.schema import Prompt


class PythonReward:
    """A function as a reward. Its version names the digests of its source file and of its params."""

    def __init__(self, name: str, params: Mapping[str, Any], where: str) -> None:
        """name: what follows `python:`. Raises VasError when it cannot be imported or called so."""
        module_name, function_name = _split(name, f"{where}.use")
        module = _load(module_name, f"{where}.use")
        self.function = _function(module, module_name, function_name, f"{where}.use")
        self.params = dict(params)
        _check_params(self.function, self.params, f"{where}.params")
        source = _source_digest(self.function, module)
        self.version = f"python:{name} source={source} params={params_digest(self.params)}"

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float]:
        return self.function(prompts, responses, **self.params)


def _split(name: str, where: str) -> tuple[str, str]:
    """(module or file, function)."""
    module, _, function = name.rpartition(":" if ":" in name else ".")
    if not module or not function:
        raise VasError(
            f"'python:{name}' names no function",
            where,
            "write python:module.function or python:path/to/file.py:function",
        )
    return module, function


def _load(name: str, where: str) -> ModuleType:
    try:
        return _load_file(Path(name), where) if name.endswith(".py") else importlib.import_module(name)
    except VasError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise VasError(
                f"there is no Python module '{error.name}'",
                where,
                "install it, put its folder on PYTHONPATH, or name the file: python:path/to/file.py:function",
            ) from None
        raise VasError(
            f"'{name}' cannot be imported: it needs the module '{error.name}'",
            where,
            f"install '{error.name}'",
        ) from None
    except Exception as error:  # the file is the user's: it may raise anything
        raise VasError(
            f"'{name}' cannot be imported: {type(error).__name__}: {error}", where, "mend that file"
        ) from None


def _load_file(path: Path, where: str) -> ModuleType:
    """Import a file that is on no path, once for each content."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VasError(
            f"cannot read '{path}': {error.strerror}",
            where,
            "check the path; it is relative to the working folder",
        ) from None
    name = f"vas_reward_{hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function(module: ModuleType, module_name: str, name: str, where: str) -> Callable[..., Any]:
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        raise VasError(f"'{module_name}' has no function '{name}'", where, nearest(name, public))
    function = getattr(module, name)
    if not callable(function):
        raise VasError(
            f"'{name}' of '{module_name}' is no function but a {type(function).__name__}",
            where,
            "name a function(prompts, responses, **params)",
        )
    return function


def _check_params(function: Callable[..., Any], params: dict[str, Any], where: str) -> None:
    """VasError unless function(prompts, responses, **params) fits its signature."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    keywords = list(signature.parameters.values())[2:]
    if not any(keyword.kind is keyword.VAR_KEYWORD for keyword in keywords):
        known = [keyword.name for keyword in keywords if keyword.kind is not keyword.VAR_POSITIONAL]
        for name in params:
            if name not in known:
                raise VasError(f"wrong reward params: {unknown_param(name, known)}", where)
    try:
        signature.bind([], [], **params)
    except TypeError as error:
        raise VasError(
            f"the reward cannot be called as function(prompts, responses, **params): {error}",
            where,
            f"its signature is {signature}",
        ) from None


def _source_digest(function: Callable[..., Any], module: ModuleType) -> str:
    """Digest of the file that defines the function (of the module it is named in, where that is unknown)."""
    try:
        path = inspect.getsourcefile(function)
    except TypeError:  # an object with __call__, a function written in C
        path = None
    path = path or getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else "unknown"
