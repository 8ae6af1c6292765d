"""The README of kernels: its examples run, its table lists every kernel. (Importing it alone: test_imports.py.)"""

import doctest
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_examples_of_the_readme_run() -> None:
    found = doctest.testfile(str(REPOSITORY / "kernels" / "README.md"), module_relative=False)
    assert found.attempted > 15 and not found.failed


def test_the_readme_lists_every_kernel_that_is_built() -> None:
    from kernels.build_cases import cases

    text = (REPOSITORY / "kernels" / "README.md").read_text()
    for case in cases():
        assert f"| {case.name} | {case.bytes_moved / 1e6:.1f} |" in text, "run `python -m kernels.build --table`"
