"""Objects known by a name: the kinds of masks and of teachers. Imports nothing of umt_fast, and no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """What a registry holds."""

    name: str
    """In configurations and checkpoints; never changed."""


N = TypeVar("N", bound=Named)


class Registry(Generic[N]):
    """Objects of one sort by their names, in the order in which they were registered."""

    def __init__(self, sort: str) -> None:
        """sort: what the objects are, for messages."""
        self.sort = sort
        self.entries: dict[str, N] = {}

    def register(self, entry: N) -> N:
        """Makes an object known by its name, and returns it. Raises ValueError: another one has the name."""
        if self.entries.get(entry.name, entry) is not entry:
            raise ValueError(f"there is a {self.sort} {entry.name!r} already; give this one another name")
        self.entries[entry.name] = entry
        return entry

    def named(self, name: str) -> N:
        """The object of a name. Raises ValueError with the message of `unknown`: none has it."""
        if name not in self.entries:
            raise ValueError(self.unknown(name))
        return self.entries[name]

    def unknown(self, name: str) -> str:
        """What to say of a name that nothing has: the nearest one, and all there are."""
        near = difflib.get_close_matches(name, self.entries, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"unknown {self.sort} {name!r}{hint} Known: {', '.join(self.entries)}"

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[N]:
        return iter(self.entries.values())
