"""The built-in rewards. Each judges the response alone; none needs a network or a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import Field, field_validator

from vas.rewards.registry import BuiltinReward, register
from vas.schema import Prompt


@register("sentiment", needs="vaderSentiment")
class Sentiment(BuiltinReward):
    """Sentiment of the response, −1 (negative) to 1 (positive), by the VADER lexicon.

    The compound score of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
    Analysis of Social Media Text" (ICWSM 2014). English; 0 for a text with no word it knows.
    """

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(_vader().polarity_scores(response)["compound"]) for response in responses]


@register("brevity")
class Brevity(BuiltinReward):
    """Shortness of the response, 0 to 1: 1 − words/limit, but 0 below min_words words.

    Words are what white space separates. The cliff at min_words is there so that saying nothing
    is not the best answer.
    """

    limit: int = Field(30, gt=0)
    """Words at which the reward has fallen to 0."""
    min_words: int = Field(3, ge=0)
    """Fewer words than this score 0."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [self._one(_words(response)) for response in responses]

    def _one(self, words: int) -> float:
        return 0.0 if words < self.min_words else max(0.0, 1.0 - words / self.limit)


@register("length")
class Length(BuiltinReward):
    """Number of words in the response, 0 upwards; a negative strength asks for short answers.

    Words are what white space separates.
    """

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(_words(response)) for response in responses]


@register("readability", needs="textstat", also=("pyphen",))
class Readability(BuiltinReward):
    """Ease of reading, 0 (hard) to 1 (easy): Flesch reading ease / 100, clipped.

    206.835 − 1.015·words/sentences − 84.6·syllables/words (Flesch, "A New Readability Yardstick",
    Journal of Applied Psychology 32, 1948). English; a text with no letter or digit scores 0.
    """

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        import textstat

        return [
            min(1.0, max(0.0, textstat.flesch_reading_ease(response) / 100))
            if any(character.isalnum() for character in response)
            else 0.0
            for response in responses
        ]


@register("profanity", needs="alt-profanity-check", module="profanity_check", also=("scikit-learn",))
class Profanity(BuiltinReward):
    """Probability that the response is profane, 0 to 1; lower is cleaner (use a negative strength).

    The calibrated linear SVM on word counts that alt-profanity-check ships. English.
    """

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        from profanity_check import predict_prob

        return [float(probability) for probability in predict_prob(list(responses))]


@register("contains")
class Contains(BuiltinReward):
    """1 if the regular expression `pattern` is found anywhere in the response, else 0."""

    pattern: str
    """Regular expression, in Python's syntax."""
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        pattern = re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)
        return [float(pattern.search(response) is not None) for response in responses]


def _words(text: str) -> int:
    return len(text.split())


@cache
def _vader() -> Any:
    """The lexicon, read once a process."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
