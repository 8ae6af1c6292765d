"""JSON lists one element at a time: a list of tens of millions is never in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from umt_fast.data.errors import DataError

# Characters read at once, and the most that one element may have.
_BLOCK, _LARGEST = 1 << 20, 1 << 26
_BLANKS = re.compile(r"[ \t\r\n]*")


def shortened(value: Any) -> str:
    """A JSON value as messages show it."""
    try:
        return json.dumps(value)[:200]
    except RecursionError:
        return "nested too deeply"


class _JsonText:
    """Values and marks of a JSON file one at a time, with a block of it in memory.

    Not ijson with yajl: it makes `?` of half a surrogate pair in a name, refuses a list for a NaN or a number beyond 64 bits
    in a field that nobody reads, and takes memory with the square of the nesting.
    """

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at = file, "", 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            self.text, self.at = self.file.read(_BLOCK), 0
            if not self.text:
                return ""

    def mark(self, allowed: str) -> str:
        """Goes past the next character, one of `allowed`."""
        found = self.peek()
        if not found or found not in allowed:
            raise json.JSONDecodeError(f"expected {' or '.join(allowed)}", self.text, self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value, however many blocks it takes."""
        self.peek()
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError:
                more = self.file.read(_BLOCK) if len(self.text) - self.at < _LARGEST else ""
                if not more:
                    raise
                self.text, self.at = self.text[self.at :] + more, 0


def json_list(path: Path, layout: str) -> Iterator[Any]:
    """The elements of a JSON list. layout: what an element should be, for messages.

    Raises DataError: no JSON, another kind of value, an element nested too deeply.
    """
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = _JsonText(file)
            if text.peek() != "[":
                kind = type(text.value()).__name__
                raise DataError(f"{path} holds a JSON {kind}; it must be a list of entries")
            text.mark("[")
            if text.peek() == "]":
                return
            while True:
                yield text.value()
                number += 1
                if text.mark(",]") == "]":
                    break
            if text.peek():
                raise json.JSONDecodeError("text after the list", "", 0)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON (entry {number}: {error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{path}: entry {number} is nested too deeply; expected {layout}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not JSON in UTF-8; convert it (as by `iconv -f UTF-16 -t UTF-8`)") from error
