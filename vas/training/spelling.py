"""Whether a value model reads the base model's tokens, or text in tokens of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vas.config import RunConfig

if TYPE_CHECKING:  # torch loads with it
    from vas.models.translation import Translation


class Spelling(NamedTuple):
    """Tokenizers and their revisions: the base model's, and another one of the value model."""

    base: str
    base_revision: str | None
    value: str
    value_revision: str | None

    @classmethod
    def of(cls, config: RunConfig) -> Spelling | None:
        """The run's; None if there is one tokenizer for both. Raises VasError for one that cannot be loaded."""
        from vas.models.base import load_tokenizer, tokenizer_digest

        base, own = (config.base.tokenizer_id, config.base.revision), config.value_tokenizer()
        if base == own or len({tokenizer_digest(load_tokenizer(*each)) for each in (base, own)}) == 1:
            return None
        return cls(*base, *own)

    def load(self) -> Translation:
        """From the one's tokens to the other's. Raises VasError for a value model's tokenizer that has no EOS."""
        from vas.models.base import load_tokenizer
        from vas.models.server import eos_token_ids
        from vas.models.translation import Translation

        base = load_tokenizer(self.base, self.base_revision)
        eos = eos_token_ids(self.base, self.base_revision, base)
        return Translation(base, eos, load_tokenizer(self.value, self.value_revision))
