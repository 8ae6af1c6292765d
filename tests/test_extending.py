"""What docs/extending.md promises: its code, put where it says, trains; nothing else is edited."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umt_fast.models.weights import save_state

pytestmark = pytest.mark.slow  # eight processes that import torch
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


def run(extended: Path, *command: object, status: int = 0) -> str:
    """What a Python process in the copy says."""
    environment = {**os.environ, "PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stderr if status else done.stdout


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


@pytest.mark.process
@pytest.mark.slow
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


TEACHER = """
import sys, torch
import torch.nn.functional as F
from tests.assets import tiny
from umt_fast.config import MaskConfig, TeacherConfig
from umt_fast.models.teachers import build_teacher
from umt_fast.models.weights import load_state
from umt_fast.tasks.video_text import VideoTextPretraining

sizes = {"patch_size": 16, "image_size": 32, "output_dim": 16}
teacher = build_teacher(TeacherConfig(kind="patches", weights=sys.argv[1], **sizes), 2)
state, video = load_state(sys.argv[1]), torch.randn(2, 3, 4, 32, 32)
# A token's pixels by hand: colors, rows, columns.
rows = video.unfold(3, 16, 16).unfold(4, 16, 16).permute(0, 2, 3, 4, 1, 5, 6).reshape(2, 16, 768)
expected = rows @ state["weight"].T + state["bias"]
for kind in ("semantic", "tube", "random"):
    out = teacher(video, MaskConfig(kind=kind, ratio=0.5), torch.tensor([1]), with_image=True)
    picked = expected.gather(1, out.visible.long()[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(out.targets, torch.stack([picked, picked]), rtol=1e-4, atol=1e-4)
torch.testing.assert_close(out.image, F.normalize(expected.mean(1), dim=-1), rtol=1e-4, atol=1e-5)
config = tiny.captions()
config.teacher, config.losses.vision_projection, config.embed_dim = teacher.config, 1.0, 16
objective = VideoTextPretraining(config, mask_id=3, special=(0, 1, 2)).train()
texts = {"ids": torch.randint(4, 16, (2, 6)), "mask": torch.ones(2, 6, dtype=torch.bool), "sample": torch.arange(2)}
loss = objective({"video": video} | texts, torch.tensor([1]))["loss"]
loss.backward()
print(torch.isfinite(loss).item())
"""


def test_a_teacher_is_two_files(extended: Path, tmp_path: Path, tiny_list: Path) -> None:
    files = ["umt_fast/models/teachers/patches.py", "umt_fast/models/weights/patches.py"]
    assert [path for path in EXAMPLES if "mask" not in path] == files
    weights = tmp_path / "layer.safetensors"
    save_state({"weight": torch.randn(16, 768), "bias": torch.randn(16)}, weights)
    assert run(extended, "-c", TEACHER, weights).strip() == "True", "both stages, and what it computes"
    options = ["--teacher.kind", "patches", "--teacher.weights", weights]
    losses = trained(extended, tmp_path / "run", tiny_list, *options)
    assert len(losses) == 3
    content = torch.load(max((tmp_path / "run").glob("checkpoint-*.pt")), weights_only=True)
    assert content["config"]["teacher"]["kind"] == "patches"
    page = ["tests/assets/tiny.py", *options]
    said = run(extended, "-m", "umt_fast", "train", *page, "--teacher.precision", "int8", status=2)
    assert "teacher.precision is 'int8', which teacher.kind 'patches' does not have; it has: native" in said
    assert "GFLOP per clip" in run(extended, "-m", "umt_fast", "plan", *page, "--gpus", 1, "--clips", 100)
