"""What docs/extending.md promises: its code, put where it says, trains; nothing else is edited."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
# The page's examples by the path that each begins with.
EXAMPLES = {
    match[1]: match[0] for match in re.finditer(r"(?<=```python\n)# (\S+\.py)\n.*?(?=```\n)", PAGE, flags=re.DOTALL)
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's files added."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("umt_fast", "kernels", "recipes", "tests/assets"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in EXAMPLES.items():
        assert not (folder / path).exists(), path
        (folder / path).write_text(code)
    return folder


def run(extended: Path, *command: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trained(extended: Path, out: Path, table: Path, *options: object) -> list[float]:
    """The losses of three steps of the tiny page."""
    command = ["-m", "umt_fast", "train", "tests/assets/tiny.py", "--data.train", table, "--run.out", out]
    run(extended, *command, *options)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


DRAW = """
import json, sys
import umt_fast.config
assert "torch" not in sys.modules, "configurations need no torch"
import torch
from umt_fast.masking import TokenGrid, mask_named
kind, grid = mask_named("block"), TokenGrid(3, 6, 5)
drawn = [kind.draw(32, grid, 0.5, torch.tensor([seed])) for seed in range(4)]
assert all(visible.dtype == torch.int32 and visible.shape == (32, kind.count(grid, 0.5)) for visible in drawn)
print(json.dumps(torch.cat(drawn).tolist()))
"""


def test_a_mask_is_one_file(extended: Path, tmp_path: Path, tiny_list: Path) -> None:
    assert [path for path in EXAMPLES if "mask" in path] == ["umt_fast/masking/kinds/block.py"]
    places = set()
    for visible in json.loads(run(extended, "-c", DRAW)):
        assert visible == sorted(set(visible)) and max(visible) < 90
        hidden = [set(range(30)) - {index - 30 * frame for index in visible} for frame in range(3)]
        assert hidden[0] == hidden[1] == hidden[2]
        rows, columns = {index // 5 for index in hidden[0]}, {index % 5 for index in hidden[0]}
        assert hidden[0] == {5 * row + column for row in rows for column in columns}
        assert rows == set(range(min(rows), min(rows) + 4)) and columns == set(range(min(columns), min(columns) + 3))
        places.add((min(rows), min(columns)))
    assert len(places) == 9, "every place of the block is drawn: 3 x 3 of them, 128 draws"
    options = ["--mask.kind", "block", "--mask.ratio", 0.5]
    losses = trained(extended, tmp_path / "block", tiny_list, *options)
    assert len(losses) == 3 and losses != trained(extended, tmp_path / "tube", tiny_list, "--mask.kind", "tube")
