"""Objects by their names: the registry, and what a configuration says of a name that nothing has."""

from types import SimpleNamespace

import pytest

from umt_fast.config import ConfigError, MaskConfig, Stage1Config, from_dict, to_dict
from umt_fast.masking import MASKS
from umt_fast.registry import Registry


def test_names_are_one_objects_alone() -> None:
    sorts: Registry = Registry("fruit")
    apple, pear = SimpleNamespace(name="apple"), SimpleNamespace(name="pear")
    assert sorts.register(apple) is apple and sorts.register(pear) is pear and sorts.register(apple) is apple
    assert list(sorts) == [apple, pear] and sorts.named("pear") is pear and "plum" not in sorts
    with pytest.raises(ValueError, match="there is a fruit 'apple' already"):
        sorts.register(SimpleNamespace(name="apple"))
    with pytest.raises(ValueError, match="unknown fruit 'aple'; did you mean 'apple'. Known: apple, pear"):
        sorts.named("aple")


def test_an_unknown_mask_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown mask kind 'semantik'; did you mean 'semantic'. Known: random, "):
        MaskConfig(kind="semantik")
    config = Stage1Config()
    config.mask.kind = "tub"
    with pytest.raises(ConfigError, match="did you mean 'tube'"):
        from_dict(Stage1Config, to_dict(config))
    assert {kind.name for kind in MASKS} == {"random", "semantic", "tube"}
