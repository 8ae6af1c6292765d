"""Which tokenizer a model reads texts with, as files carry it."""

from __future__ import annotations

from typing import NamedTuple


class Vocabulary(NamedTuple):
    """A tokenizer by name and content. A file that knows less has empty fields; the last two are written together."""

    name: str = ""
    """Of the Hub, or a folder: as it was given, so a folder may be none elsewhere."""
    fingerprint: str = ""
    """The number of its tokens and a hash of them in their order, as `30522-0a1b2c3d4e5f`."""
    definition: str = ""
    """The whole tokenizer: what its tokenizer.json would hold, and which tokens are special, as JSON."""

    def given(self, name: str) -> Vocabulary:
        """A tokenizer that somebody names in place of this one: it must have the same tokens, where those are known."""
        return Vocabulary(name, self.fingerprint) if name else self
