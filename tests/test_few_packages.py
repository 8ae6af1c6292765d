"""Which packages each use needs: models alone, a lent GPU machine, and one clear error that names the extra of the rest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.process

# What extras bring (pyproject.toml), by the name it is imported with.
EXTRAS = (
    *("av", "PIL", "tyro", "tensorboard", "open_clip", "transformers", "cv2", "torchvision", "timm", "nvidia.dali"),
    "matplotlib",
)
BLOCKED = """
import builtins, os, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
for name in BLOCKED:
    sys.modules[name] = None
"""
# A lent GPU machine has torch, triton, transformers, numpy, pillow, safetensors and pytest alone. transformers needs
# huggingface_hub itself: what our own files import of it is refused instead.
LENT = ("open_clip", "av", "tyro", "tensorboard", "hypothesis", "nvidia.dali", "cv2", "torchvision", "matplotlib")
WITHOUT_HUB = """
plain = builtins.__import__
def checked(name, globals=None, *rest, **named):
    ours = str((globals or {}).get("__file__", "")).startswith(REPOSITORY)
    if ours and name.split(".")[0] == "huggingface_hub":
        raise ModuleNotFoundError("No module named 'huggingface_hub' (blocked)", name="huggingface_hub")
    return plain(name, globals, *rest, **named)
builtins.__import__ = checked
"""
MODULES = (
    "umt_fast.models.teachers.clip_text",
    "umt_fast.models.weights",
    "umt_fast.tasks.video_text",
    "umt_fast.engine.trainer",
    "umt_fast.bench.stage1",
    "umt_fast.bench.stage2",
    "umt_fast.bench.finetune",
    "umt_fast.train",
    "umt_fast.plan",
    "umt_fast.data.loaders.captions",
    "umt_fast.data.prepare.shards",
    "umt_fast.tasks.retrieval",
    "umt_fast.sample_world.quickstart",
    "umt_fast.tasks.detection",
    "umt_fast.data.decode.detection_clip",
    "umt_fast.data.decode.detection_view",
    "umt_fast.data.decode.movies",
    "umt_fast.sample_world.boxes",
    "benchmarks.gpu",
    "benchmarks.rates",
    "benchmarks.checks",
    "benchmarks.steps",
    "benchmarks.trainer_run",
    "benchmarks.bench_kernels",
    "benchmarks.report",
    "benchmarks.counted",
)


def run(program: str, blocked: tuple[str, ...] = LENT) -> str:
    head = f"REPOSITORY, BLOCKED = {str(REPOSITORY / 'umt_fast')!r}, {blocked!r}\n{BLOCKED}"
    head += WITHOUT_HUB if blocked is LENT else ""
    done = subprocess.run([sys.executable, "-c", head + program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    """Of each module what importing it raised, or nothing; all in one process, which imports torch once."""
    program = f"""
import importlib, json
found = {{}}
for name in {MODULES!r}:
    try:
        importlib.import_module(name)
        found[name] = ""
    except BaseException as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""
    return json.loads(run(program))


@pytest.mark.parametrize("name", MODULES)
def test_modules_import(name: str, imported: dict[str, str]) -> None:
    assert imported[name] == ""


def test_models_alone(tmp_path: Path) -> None:
    """torch, triton, numpy, safetensors and huggingface_hub are enough for models on decoded frames; the rest is named."""
    program = f"""
import json, torch, umt_fast
frames = torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8)
said = {{}}
def refused(name, call):
    try:
        call()
    except umt_fast.ConfigError as error:
        said[name] = [type(error).__name__, str(error)]
model = umt_fast.load_model("umt_b16_stage1", weights="untrained", device="cpu", image_size=32)
said["features"] = list(model.features(frames, layers=[0]).pooled.shape)
refused("a file", lambda: model.features("pyproject.toml"))
refused("a resize", lambda: model.features(frames[..., :24, :, :]))
classes = umt_fast.load_model("umt_b16_ft", weights="untrained", device="cpu", image_size=32, num_classes=5)
said["logits"] = list(classes.logits(frames).shape)
refused("a tokenizer", lambda: __import__("umt_fast.data.loaders.tokens").data.loaders.tokens.load_tokenizer("x"))
refused("a teacher by name", lambda: umt_fast.load_teacher("clip_b16"))
refused("TensorBoard", lambda: __import__("umt_fast.engine.logging").engine.logging.MetricsLog(
    __import__("pathlib").Path({str(tmp_path)!r}), 0, True))
refused("a report", lambda: __import__("umt_fast.report"))
refused("boxes", lambda: __import__("umt_fast.models.detector").models.detector._roi_align())
import contextlib, io
with contextlib.redirect_stderr(io.StringIO()) as printed:
    status = __import__("umt_fast.cli.main").cli.main.main(["scan", "list.csv", "--out", "x"])
said["a command"] = ["ConfigError", printed.getvalue().strip() if status == 2 else str(status)]
print(json.dumps(said))
"""
    said = json.loads(run(program, EXTRAS))
    assert said.pop("features") == [2, 768] and said.pop("logits") == [2, 5]
    extras = {
        "a file": ("av", "video"),
        "a resize": ("pillow", "video"),
        "a tokenizer": ("transformers", "text"),
        "a teacher by name": ("open_clip_torch", "train"),
        "TensorBoard": ("tensorboard", "train"),
        "a command": ("tyro", "cli"),
        "a report": ("pillow", "video"),
        "boxes": ("torchvision", "detection"),
    }
    assert said.keys() == extras.keys()
    for name, (package, extra) in extras.items():
        kind, message = said[name]
        assert kind in ("MissingPackageError", "ConfigError"), name
        assert package in message and f"umt_fast[{extra}]" in message and len(message.splitlines()) == 1, message


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


@pytest.mark.slow
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
