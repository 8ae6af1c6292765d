"""recipes/lower_bounds.sh names tests that there are."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_tests_of_the_lowest_versions_exist() -> None:
    named = re.findall(r"tests/[\w/.]+", (REPOSITORY / "recipes" / "lower_bounds.sh").read_text())
    assert len(named) > 5 and not [name for name in named if not (REPOSITORY / name).exists()]
