"""run.attention reaches every attention of student, teacher and text."""

import pytest
import torch

import kernels
from tests.assets import tiny
from umt_fast.config import ConfigError, Stage2Config
from umt_fast.models.attention import require_attention
from umt_fast.tasks.classification import Supervised
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.tasks.video_text import VideoTextPretraining


def batch(packed: bool) -> dict[str, torch.Tensor]:
    texts = {"ids": torch.randint(4, 16, (2, 6)), "mask": torch.ones(2, 6, dtype=torch.bool), "sample": torch.arange(2)}
    found = {"video": torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8), "label": torch.tensor([0, 1])} | texts
    if packed:
        image = {"video": torch.randint(256, (2, 1, 32, 32, 3), dtype=torch.uint8)} | texts
        found |= {f"image_{name}": value for name, value in image.items()}
    return found


@pytest.mark.parametrize(("kind", "calls"), [("stage1", 4), ("stage2", 9), ("packed", 11), ("classes", 2)])
def test_every_attention_is_told(kind: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    preferred = []

    def spy(name: str):
        compute = getattr(kernels, name)
        return lambda *args, **options: (preferred.append(options.get("prefer")), compute(*args, **options))[1]

    for name in ("attention", "attention_qkv", "attention_varlen"):
        monkeypatch.setattr(kernels, name, spy(name))
    if kind == "stage1":
        config, make = tiny.tiny(), UnmaskedAlignment
    elif kind == "classes":
        config, make = tiny.classes(), Supervised
    else:
        config, make = tiny.captions(), lambda config: VideoTextPretraining(config, mask_id=3, special=(0, 1, 2))
    found = []
    for backend in ("auto", "math"):
        config.run.attention = backend
        torch.manual_seed(0)
        objective = make(config).eval()  # without dropout, which math does not take
        torch.manual_seed(1)
        preferred.clear()
        found.append(objective(batch(kind == "packed"), torch.tensor([5]))["loss"])
        assert set(preferred) == {backend} and len(preferred) >= calls, preferred
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "xformers", "flash_attn"])
def test_a_backend_that_cannot_run_is_refused_in_one_line(backend: str) -> None:
    config: Stage2Config = tiny.captions()
    config.run.attention = backend
    with pytest.raises(ConfigError, match=f"run.attention is '{backend}': ") as caught:
        require_attention(config, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    config.run.attention = "auto"
    require_attention(config, torch.device("cpu"))


def test_backends_that_add_in_any_order_do_not_go_with_deterministic() -> None:
    config = tiny.tiny()
    config.run.attention, config.run.deterministic = "cudnn", True
    with pytest.raises(ConfigError, match="run.deterministic rules out"):
        require_attention(config, torch.device("cuda"))
