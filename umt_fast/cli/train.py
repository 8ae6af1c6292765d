"""`train` and `plan`: a recipe's run, or what it would take."""

from __future__ import annotations

from umt_fast import interrupts, recipe
from umt_fast.cli.command import call
from umt_fast.config import ConfigError


def train(arguments: list[str]) -> None:
    """One training run of a recipe."""
    if not arguments or arguments[0].startswith("-"):
        if arguments in (["--help"], ["-h"]):
            print("usage: python -m umt_fast train RECIPE [--section.key value ...]")
            print(f"recipes: {', '.join(recipe.names())}, each with variants as NAME:VARIANT, or the path of a page")
            print("`python -m umt_fast train RECIPE --help` lists every key with its default.")
            return
        raise ConfigError(f"train needs a recipe first; known: {', '.join(recipe.names())}")
    base = recipe.load(arguments[0])
    config = call(type(base), arguments[1:], f"train {arguments[0]}", default=base)
    from umt_fast.train import train as run

    interrupts.raise_again()
    run(config)


def plan(arguments: list[str]) -> None:
    """Hours of a recipe's run."""
    from umt_fast.plan import PlanOptions, report

    if not arguments or (arguments[0].startswith("-") and arguments not in (["--help"], ["-h"])):
        raise ConfigError(f"plan needs a recipe first; known: {', '.join(recipe.names())}")
    helped = arguments[0].startswith("-")
    options, rest = call(
        PlanOptions,
        arguments if helped else arguments[1:],
        f"plan {'RECIPE' if helped else arguments[0]}",
        description="Hours of a run and what bounds them. Any key of the recipe may follow (--run.batch_size 32 ...).",
        return_unknown_args=True,
    )
    base = recipe.load(arguments[0])
    config = call(type(base), rest, f"plan {arguments[0]}", default=base)
    print(report(arguments[0], config, options, recipe.clips_of(arguments[0])))
