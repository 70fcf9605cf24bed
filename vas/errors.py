"""The one error a user ever sees: what is wrong, where, and how to mend it."""

from collections.abc import Iterator


class VasError(Exception):
    """A mistake or obstacle that the user can mend.

    what: one sentence that says what is wrong, or a line that introduces a list of mistakes.
    where: the file, key, row or URI concerned.
    mend: what to do about it.
    """

    def __init__(self, what: str, where: str | None = None, mend: str | None = None) -> None:
        super().__init__(what, where, mend)
        self.what = what
        self.where = where
        self.mend = mend

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.mend:
            lines.append(f"  mend:  {self.mend}")
        return "\n".join(lines)


class EngineDied(Exception):
    """An engine is beyond use, and so is its process: a fault of the device or of the engine's own worker.

    What it was to do can be done by another process.
    """


class Rejected(Exception):
    """The server would not do it, however often it is asked.

    whole: whatever else it is asked, it would not do that either. status: what it answered, if it did.
    """

    def __init__(self, error: VasError, whole: bool, status: int | None = None) -> None:
        super().__init__(str(error))
        self.error, self.whole, self.status = error, whole, status

    def __reduce__(self) -> "tuple[type[Rejected], tuple[VasError, bool, int | None]]":
        """It crosses processes."""
        return type(self), (self.error, self.whole, self.status)


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """A sentence that suggests the nearest known name, or lists them all."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(sorted(known))}" if known else "none is known"


def as_vas_error(error: BaseException | None) -> VasError | None:
    """The VasError behind an exception, however Ray or a chain of causes has wrapped it; else None."""
    return next((cause for cause in causes(error) if type(cause) is VasError), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that it came of."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        here = pending.pop()
        if here is None or id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        failures = getattr(here, "worker_failures", None) or {}
        pending += [here.__context__, here.__cause__, getattr(here, "cause", None), *failures.values()]
