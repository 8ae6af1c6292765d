"""How a command's arguments become a call: tyro reads them, prints the help, and says what is wrong with them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import tyro

from umt_fast import interrupts
from umt_fast.config import check_number, require


def call(function: Any, arguments: list[str], name: str, **keywords: Any) -> Any:
    """Reads the arguments of command `name` and calls a function, or builds a dataclass, with them.

    keywords: further ones of tyro.cli. Raises SystemExit: --help (0), or arguments that do not fit (2), after tyro said so.
    """
    deferred = inspect.isfunction(function)
    result = tyro.cli(
        _deferred(function) if deferred else function,
        args=arguments,
        prog=f"python -m umt_fast {name}",
        use_underscores=True,
        **keywords,
    )
    # Outside of tyro, which takes some errors of what it calls for errors of the arguments.
    return result() if deferred else result


def _deferred(function: Any) -> Any:
    @functools.wraps(function)
    def call_later(*values: Any, **named: Any) -> Any:
        return functools.partial(_checked, function, *values, **named)

    return call_later


def _checked(function: Any, *values: Any, **named: Any) -> Any:
    """Calls with numbers that are finite, fit into 64 bits and are not negative: no command has others."""
    for name, value in inspect.signature(function).bind(*values, **named).arguments.items():
        check_number(f"--{name}", value)
        negative = isinstance(value, (int, float)) and value < 0
        require(not negative, f"--{name} is {value}; it must not be negative")
    interrupts.raise_again()
    return function(*values, **named)
