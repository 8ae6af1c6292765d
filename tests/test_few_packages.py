"""Where only torch, triton, transformers, numpy, pillow, safetensors and pytest are installed, as on a lent GPU machine."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# transformers needs huggingface_hub itself: what our own files import of it is refused instead.
WITHOUT = """
import builtins, os, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
for name in ("open_clip", "av", "tyro", "tensorboard", "hypothesis", "nvidia.dali", "cv2", "torchvision", "matplotlib"):
    sys.modules[name] = None
plain = builtins.__import__
def checked(name, globals=None, *rest, **named):
    ours = str((globals or {}).get("__file__", "")).startswith(REPOSITORY)
    if ours and name.split(".")[0] == "huggingface_hub":
        raise ModuleNotFoundError("No module named 'huggingface_hub' (blocked)", name="huggingface_hub")
    return plain(name, globals, *rest, **named)
builtins.__import__ = checked
"""


def run(program: str) -> str:
    head = f"REPOSITORY = {str(REPOSITORY / 'umt_fast')!r}\n{WITHOUT}"
    done = subprocess.run([sys.executable, "-c", head + program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "umt_fast.models.teachers.clip_text",
        "umt_fast.models.weights",
        "umt_fast.tasks.video_text",
        "umt_fast.engine.trainer",
        "umt_fast.bench.stage1",
        "umt_fast.bench.stage2",
        "umt_fast.train",
        "umt_fast.plan",
        "umt_fast.data.loaders.captions",
        "umt_fast.data.prepare.shards",
        "umt_fast.tasks.retrieval",
        "umt_fast.sample_world.quickstart",
        "umt_fast.tasks.detection",
        "umt_fast.data.decode.detection_clip",
        "umt_fast.data.decode.detection_view",
        "benchmarks.gpu",
        "benchmarks.rates",
        "benchmarks.checks",
        "benchmarks.steps",
        "benchmarks.trainer_run",
        "benchmarks.bench_kernels",
        "benchmarks.report",
        "benchmarks.predict",
    ],
)
def test_modules_import(name: str) -> None:
    assert run(f"import {name}\nprint({name}.__name__)").strip() == name


def test_frame_folders_are_prepared_and_read(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from benchmarks.trainer_run import FRAMES, Settings, _write, prepare, DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.sources.lists import read_list
folder = Path({str(tmp_path)!r})
for number in range(2):
    _write((number, str(folder / str(number))))
(folder / "list.csv").write_text("".join(f"{{n}},{{FRAMES}},{{n}}\\n" for n in range(2)))
prepare(folder / "list.csv", folder / "prepared", settings=Settings(short_side=64), workers=0)
data = DataConfig(train=str(folder / "list.csv"), prepared=(str(folder / "prepared"),), workers=0)
loader = ClipLoader(read_list(data.train, data), data, num_frames=8, image_size=32, batch_size=2)
print(all(clip.shard for clip in loader.clips), [tuple(b["video"].shape) for b in loader])
"""
    assert run(program).startswith("True [(2, 8, 32, 32, 3)]")


def test_kernels_and_objectives_are_collected_and_run() -> None:
    options = ["-q", "-p", "no:cacheprovider", "tests/kernels", "tests/objectives"]
    program = "import pytest\nsys.exit(pytest.main({}))"
    collected = run(program.format([*options, "--collect-only"])).splitlines()
    for folder, least in (("tests/kernels", 150), ("tests/objectives", 30)):
        found = sum(line.startswith(folder) and "::" in line for line in collected)
        assert found > least, f"{found} tests of {folder}"
    names = "planted_wait or clips_text_tower or test_block_sizes_and_warps or test_text_projection or test_fuzz"
    said = run(program.format([*options, "-rs", "-k", names])).strip()
    assert " passed" in said and "failed" not in said
    # Tests of what is not there skip, and say why.
    assert "could not import 'hypothesis'" in said and "could not import 'open_clip'" in said
