"""OpenAI's archives are read without being run."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from umt_fast.config import TeacherConfig
from umt_fast.models.teachers import build_teacher, load_teacher
from umt_fast.models.teachers.clip import ClipTeacher
from umt_fast.models.teachers.clip_text import load_clip_text
from umt_fast.models.weights import WeightsError, load_state

SIZES = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 16, "output_dim": 12}


def clip() -> open_clip.CLIP:
    """A small CLIP with the names and the three numbers of OpenAI's."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
    model = open_clip.CLIP(12, vision, CLIPTextCfg(width=64, heads=1, layers=1), quick_gelu=True).eval()
    for name, number in (("input_resolution", 16), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(number))
    return model


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As OpenAI's: traced, in half precision."""
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    example = (torch.randn(1, 3, 16, 16), torch.randint(1, 9, (1, 77)))
    torch.jit.trace(clip(), example, check_trace=False).half().save(str(path))
    return path


def test_a_traced_clip_gives_its_state_dict(archive: Path) -> None:
    expected, found = torch.jit.load(archive).state_dict(), load_state(archive)
    # TorchScript keeps buffers that are not persistent, too.
    assert found.keys() == expected.keys() == clip().state_dict().keys() | {"attn_mask"}
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items())
    assert found["visual.conv1.weight"].dtype == torch.float16 and found["vocab_size"] == 49408


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.steps, self.table = nn.Linear(3, 4), [1, 2], {"a": 1}
        self.plain = torch.ones(2)  # an attribute: state_dict() leaves it out

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.steps[0] + self.plain.sum()


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Part(), nn.Linear(4, 3))
        self.tied = self.parts[1].weight
        self.view = nn.Parameter(torch.arange(24.0).view(4, 6).t()[1:3])
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.empty(0))
        self.device, self.dtype = torch.device("cpu"), torch.float16

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x) + self.view.sum() + self.count.sum()


def test_a_scripted_module_gives_its_state_dict(tmp_path: Path) -> None:
    """Types, views, tied weights, and attributes that are no weights."""
    torch.jit.script(Whole()).save(str(tmp_path / "whole.pt"))
    expected, found = torch.jit.load(tmp_path / "whole.pt").state_dict(), load_state(tmp_path / "whole.pt")
    assert found.keys() == expected.keys() and "parts.0.plain" not in found
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    assert found["tied"].data_ptr() == found["parts.1.weight"].data_ptr()


def test_a_teacher_from_an_archive(archive: Path) -> None:
    config = TeacherConfig(**SIZES, weights=str(archive))
    teacher, visual = ClipTeacher(config, 1), clip().visual.half().float()
    load_teacher(teacher)
    pixels = torch.randn(2, 3, 1, 16, 16)
    x = teacher.embed(pixels)
    for block in teacher.blocks:
        x = block(x)
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.ln_post(x[:, 0]) @ teacher.proj, visual(pixels[:, :, 0]), rtol=1e-4, atol=1e-5
        )
    assert load_clip_text(config).tower.transformer.layers == 1
    with pytest.raises(WeightsError, match="was trained with quick_gelu.*set --teacher.activation quick_gelu"):
        build_teacher(TeacherConfig(**SIZES, weights=str(archive), activation="gelu"), 1)


class Writes(nn.Module):
    """Writes a file of its choice when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.training = state[1]
        self.weight = torch.from_file("PLACE", shared=True, size=4, dtype=torch.float32).fill_(7.0)


def test_code_of_an_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(Writes()), saved)
    path, written = tmp_path / "evil.pt", tmp_path / "written"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b'"PLACE"', f'"{written}"'.encode()))
    with pytest.raises(WeightsError, match="unpacked by code of its own .__setstate__., which is not run"):
        load_state(path)
    assert not written.exists()
    torch.jit.load(path)  # the attack is a real one
    assert written.exists()


def altered(archive: Path, out: Path, alter: Callable[[str, bytes], bytes | None]) -> Path:
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = alter(name.partition("/")[2], source.read(name))
            if content is not None:
                target.writestr(name, content)
    return out


class _Call:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.made


def test_pickles_that_ask_for_more_than_tensors(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "bait").mkdir()
    for call in (_Call(exec, f"import os; os.rmdir({str(tmp_path / 'bait')!r})"), _Call(Path.rmdir, tmp_path / "bait")):
        evil = pickle.dumps(call, 2)
        path = altered(archive, tmp_path / "a.pt", lambda name, content: evil if name == "data.pkl" else content)  # noqa: B023
        with pytest.raises(WeightsError, match="it asks for .*, and only tensors are read"):
            load_state(path)
    assert (tmp_path / "bait").is_dir()


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        (lambda name, content: content[:-2] if name == "data/3" else content, "storage 3 has not the"),
        (lambda name, content: None if name == "data/3" else content, "it is damaged"),
        (lambda name, content: content[:-9] if name == "data.pkl" else content, "it is damaged|cannot be read"),
        (lambda name, content: b"big" if name == "byteorder" else content, "big-endian"),
        (lambda name, content: pickle.dumps([1], 2) if name == "data.pkl" else content, "holds no module"),
        (
            lambda name, content: content.replace(b"(K t", b"(K!t") if name == "data.pkl" else content,
            "outside its storage",
        ),
    ],
    ids=["short storage", "no storage", "short pickle", "byte order", "no module", "size"],
)
def test_damaged_archives(alter: Callable, expected: str, archive: Path, tmp_path: Path) -> None:
    path = altered(archive, tmp_path / "a.pt", alter)
    with pytest.raises(WeightsError, match=expected) as caught:
        load_state(path)
    assert "a.pt is a TorchScript archive" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_truncated_archive(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cut.pt is not a readable weights file"):
        load_state(tmp_path / "cut.pt")


def test_nothing_else_loads_archives() -> None:
    package = Path(__file__).resolve().parents[2] / "umt_fast"
    callers = [path.name for path in package.rglob("*.py") if "torch.jit.load(" in path.read_text()]
    assert callers == []
