"""What every part of a configuration shares: its error, its check, its constants, and plain dictionaries in and out."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Tokens of a caption, start and end included, that CLIP's text tower takes; OpenAI's figure, and open_clip's.
CLIP_TEXT_LENGTH = 77
# Its words: those of open_clip's tokenizer.
CLIP_TEXT_WORDS = 49408


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, the value and the rule."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def by_option(section: str, make: Callable[[], T]) -> T:
    """What `make` returns. A ConfigError of it names options of a section as a command has them that takes them alone."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{section}.", "--")) from error


def check_number(name: str, value: Any) -> None:
    """Raises ConfigError where a number is not finite or does not fit into 64 bits; other values pass."""
    if isinstance(value, float):
        require(math.isfinite(value), f"{name} is {value}; it must be a finite number")
    if isinstance(value, (int, float)):
        require(abs(value) < 2**63, f"{name} is {value}; it must be below 2^63")


def check_numbers(settings: Any, section: str = "") -> None:
    """check_number for every field of a dataclass, by its place on the command line; what each may be otherwise it says."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        for number in value if isinstance(value, tuple) else (value,):
            check_number(f"{section}.{entry.name}" if section else entry.name, number)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, for checkpoints and logs."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(kind: type[Any], values: dict[str, Any]) -> Any:
    """The inverse of to_dict. Raises ConfigError: an entry this version's configuration does not have."""
    if hasattr(kind, "upgraded"):  # a kind whose fields had other names once
        values = kind.upgraded(values)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{kind.__name__} has no {', '.join(unknown)}; it was written by another version")
    hints = typing.get_type_hints(kind)

    def value_of(name: str) -> Any:
        value = values[name]
        if dataclasses.is_dataclass(hints[name]):
            return from_dict(hints[name], value)
        return tuple(value) if typing.get_origin(hints[name]) is tuple else value

    return kind(**{name: value_of(name) for name in values})
