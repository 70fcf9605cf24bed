"""API keys: who may use the endpoint, for which objectives, within which bounds, and how much of it.

A keys file holds digests, never keys. Budgets are counted by each gateway on its own.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import Field

from vas import storage
from vas.configfile import Name, Section, read_yaml, validated
from vas.errors import VasError
from vas.serving.errors import ApiError

PREFIX = "vas-"
MINUTE = 60.0


class Key(Section):
    name: Name
    """Stands in logs and metrics."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Digest of the key, in hex."""
    objectives: dict[str, tuple[float, float]] | None = None
    """Objective → least and greatest β; objectives that are not named are refused. Default: all, within the limits."""
    requests_per_minute: int | None = Field(None, gt=0)
    tokens_per_minute: int | None = Field(None, gt=0)
    """Of prompts and responses; a response counts as its `max_tokens` until it is there."""


class Keys(Section):
    keys: list[Key]


def new_key() -> tuple[str, str]:
    """A key, and its digest for the keys file."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """A key's digest. Keys are 256 bits of chance, which nobody guesses, so it needs no salt and no slowness."""
    return hashlib.sha256(key.encode()).hexdigest()


def load_keys(location: str) -> list[Key]:
    """Read a keys file. Raises VasError for a file that is missing or malformed, or a name that stands twice."""
    found = storage.read_version(storage.absolute(location))
    if found is None:
        mend = "`vas key NAME` makes an entry for one; docs/serving.md, Keys"
        raise VasError("there is no file of API keys here", f"gate.keys: {location}", mend)
    content = read_yaml(found[0].decode(), location)
    keys = validated(Keys, content if isinstance(content, dict) else {}, location).keys
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise VasError(f"two keys have the name '{name}'", location, "name them apart")
    return keys


@dataclass(slots=True)
class _Bucket:
    """What is left of a budget, which fills up again within a minute."""

    size: float
    left: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.at = self.size, time.monotonic()

    def take(self, amount: float) -> float:
        """Take so much; returns the seconds to wait if it isn't there, and takes nothing then."""
        now = time.monotonic()
        self.left = min(self.size, self.left + (now - self.at) * self.size / MINUTE)
        self.at = now
        if amount > self.left and self.left < self.size:
            return (min(amount, self.size) - self.left) * MINUTE / self.size
        self.left -= amount  # what is larger than the whole budget waits for a full one
        return 0.0

    def give_back(self, amount: float) -> None:
        """What was taken and not used."""
        self.left = min(self.size, self.left + amount)


class Caller:
    """Who asks: a key with its budgets, or anybody where no keys are set."""

    def __init__(self, key: Key | None) -> None:
        self._key = key
        self.name = key.name if key else ""
        self._requests = _Bucket(key.requests_per_minute) if key and key.requests_per_minute else None
        self._tokens = _Bucket(key.tokens_per_minute) if key and key.tokens_per_minute else None

    def check_strength(self, objective: str, strength: float) -> None:
        """Raise ApiError unless the key may steer so. β = 0 is always allowed."""
        if self._key is None or self._key.objectives is None or strength == 0:
            return
        param = f"guidance.objectives.{objective}"
        self.check_use(objective, param)
        low, high = self._key.objectives[objective]
        if not low <= strength <= high:
            raise ApiError(403, f"this key may use strengths of '{objective}' in [{low:g}, {high:g}]", param)

    def check_use(self, objective: str, param: str) -> None:
        """Raise ApiError unless the key may ask for an objective. param: where the request names it."""
        if not self.may_use(objective):
            raise ApiError(403, f"this key may not use the objective '{objective}'", param, "objective_not_allowed")

    def may_use(self, objective: str) -> bool:
        """Whether the key may ask for values of an objective."""
        return self._key is None or self._key.objectives is None or objective in self._key.objectives

    def spend(self, tokens: int) -> None:
        """Count a request of so many tokens at most. Raises ApiError when a budget is used up."""
        for bucket, amount, what in ((self._requests, 1, "requests"), (self._tokens, tokens, "tokens")):
            if bucket is not None and (wait := bucket.take(amount)):
                if bucket is self._tokens and self._requests is not None:
                    self._requests.give_back(1)
                raise ApiError(429, f"this key's {what} a minute are used up", None, "rate_limit_exceeded", wait)

    def give_back(self, tokens: int) -> None:
        """Tokens that were counted and not used."""
        if self._tokens is not None:
            self._tokens.give_back(tokens)


def _key_of(authorization: str) -> str:
    """The key in an `Authorization` header: a bearer's token or, from a browser, the password; empty for none."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    return ""


class Doorkeeper:
    """Knows the keys. Without any, whoever reaches the endpoint may use it."""

    def __init__(self, keys: list[Key] | None) -> None:
        self._callers: list[tuple[str, Caller]] | None = None
        self._anybody = Caller(None)
        if keys is not None:
            self._callers = [(key.sha256, Caller(key)) for key in keys]

    def admit(self, authorization: str | None) -> Caller:
        """The caller of an `Authorization` header. Raises ApiError for a key that is missing or unknown."""
        if self._callers is None:
            return self._anybody
        key = _key_of(authorization or "")
        if not key:
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", None, "missing_api_key")
        digest, found = hash_of(key), None
        for known, caller in self._callers:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise ApiError(401, "this API key is unknown", None, "invalid_api_key")
        return found
