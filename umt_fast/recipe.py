"""Finds a recipe page by name or path and returns the configuration it defines.

A page is a Python file whose public functions take no argument and return a configuration, one for each variant. A page of many
alike may have them by name in a dictionary VARIANTS in their place. DEFAULT names one of them. CLIPS, if there,
is how many training clips its data set has.
`stage1_k710` means that page's DEFAULT, `stage1_k710:l16` its variant l16, `some/page.py:tiny` a page of one's own.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from umt_fast.config import ConfigError

HERE = Path(__file__).resolve().parent
# A wheel carries the repository's pages within the package (pyproject.toml); a checkout has them beside it.
BUNDLED = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes"


def folders() -> list[Path]:
    """Where named recipes are looked for: ./recipes, then our own."""
    return list(dict.fromkeys([Path.cwd() / "recipes", BUNDLED]))


def names() -> list[str]:
    """The names of all pages found."""
    return sorted({page.stem for folder in folders() for page in folder.glob("*.py")})


def _page(name: str) -> Path:
    if name.endswith(".py"):
        if not Path(name).is_file():
            near = difflib.get_close_matches(Path(name).stem, [page.stem for page in Path(name).parent.glob("*.py")], 1)
            hint = f"; did you mean {Path(name).with_stem(near[0])}?" if near else ""
            raise ConfigError(f"no recipe page at {name}{hint}")
        return Path(name)
    for folder in folders():
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    near = difflib.get_close_matches(name, names(), 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"unknown recipe {name!r}{hint} Known: {', '.join(names())}, or the path of a page ending in .py")


def _load(page: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"umt_fast_recipe_{page.stem}", page)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses resolve their annotations through sys.modules, so a page that defines one must be found there.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"recipe page {page} does not load: {type(error).__name__}: {error}") from error
    return module


def _found(recipe: str) -> tuple[Path, ModuleType, str]:
    """The page of NAME[:VARIANT], and the variant, empty where none is named. Raises ConfigError: see load."""
    name, _, variant = recipe.rpartition(":") if ":" in recipe else (recipe, "", "")
    page = _page(name)
    return page, _load(page), variant


def clips_of(recipe: str) -> int | None:
    """The training clips that a page says its data set has; None: it does not say. Raises ConfigError: see load."""
    return getattr(_found(recipe)[1], "CLIPS", None)


def load(recipe: str) -> Any:
    """The configuration of `NAME[:VARIANT]` or `PATH.py[:VARIANT]`.

    Raises ConfigError: unknown page (the nearest name is suggested), unknown variant, a page that fails.
    """
    page, module, variant = _found(recipe)
    variants = getattr(module, "VARIANTS", None) or {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    variant = variant or getattr(module, "DEFAULT", "")
    if variant not in variants:
        near = difflib.get_close_matches(variant, variants, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"recipe {page} has no variant {variant!r}{hint} It has: {', '.join(sorted(variants))}")
    config = variants[variant]()
    from umt_fast.tasks import TASKS  # imports torch, which `--help` and mistyped names need not wait for

    if not any(type(config) is task.Config for task in TASKS.values()):
        raise ConfigError(f"{page}:{variant} returns {type(config).__name__}, not one of the run configurations")
    return config
