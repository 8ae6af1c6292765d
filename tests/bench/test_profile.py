"""The profile's counts against the objective's own, and the fidelity of an 8-bit teacher."""

import json

import pytest
import torch

import kernels
from umt_fast.__main__ import main
from umt_fast.bench import stage1, stage2
from umt_fast.bench.fidelity import compare
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.tasks.video_text import VideoTextPretraining

MODELS = ["tiny", "b16", "l16"]
MEDIA = ["video", "image"]
TINY = ["--model", "tiny", "--batch_size", "2", "--device", "cpu", "--dtype", "fp32", "--steps", "1", "--profile"]


@pytest.mark.parametrize("model", MODELS)
def test_parts_add_up_to_the_step(model: str) -> None:
    config = stage1.stage1_config(model, 3, "bf16")
    total = sum(cost.flops for cost in stage1.costs(config, 1000).values())
    assert total == pytest.approx(3 * UnmaskedAlignment.flops_of(config), rel=1e-6)


@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("model", MODELS)
def test_parts_of_stage_2_add_up_to_the_step(model: str, media: str) -> None:
    config = stage2.stage2_config(model, 3, "bf16")
    total = sum(cost.flops for cost in stage2.costs(config, media, 1000).values())
    expected = VideoTextPretraining.flops_of(config, image=media == "image")
    assert total == pytest.approx(3 * expected, rel=1e-6)


def test_bytes_of_parts_counted_by_hand() -> None:
    parts = stage1.costs(stage1.stage1_config("b16", 64, "bf16"), 88_005_888)
    assert parts["loss"].bytes == 2 * 6 * 64 * 320 * 512 * 2
    assert parts["optimizer"].bytes == 8 * 4 * 88_005_888
    # uint8 pixels in, bf16 rows written and read, tokens out in fp32.
    assert parts["student patches"].bytes == 64 * 320 * (768 * 5 + 768 * 4)
    parts = stage2.costs(stage2.stage2_config("b16", 64, "bf16"), "video", 1000)
    # 160 visible tokens a clip in, two projections' weights, keys and values out; three fusion layers.
    seen = 64 * 160
    assert parts["keys of clips"].bytes == 3 * 2 * (seen * 768 + 2 * 768 * 768 + 2 * seen * 768)
    assert parts["similarity, negatives"].bytes == 2 * (512 * 2 * 768 + seen * 768) + 8 * 64 * 64


def shown(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[dict, list[str]]:
    """The JSON line of a profile and the names of its parts, which its table has too."""
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    names = [row["part"] for row in found["parts"]]
    assert all(row["ms"] > 0 for row in found["parts"])
    assert all(f"| {name} |" in out.err for name in [*names, "sum"])
    memory = found["memory_gib"]
    assert memory["peak"] > memory["trained"] + memory["gradients"] + memory["optimizer"] + memory["teacher"] > 0
    return found, names


def test_profile_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    found, names = shown(capsys, ["stage1", *TINY])
    assert names == list(stage1.costs(stage1.stage1_config("tiny", 2, "fp32"), 1)) and found["stage"] == "stage1"


@pytest.mark.parametrize("media", MEDIA)
def test_profile_of_stage_2_prints_every_part(capsys: pytest.CaptureFixture[str], media: str) -> None:
    found, names = shown(capsys, ["stage2", *TINY, "--media", media])
    assert names == list(stage2.costs(stage2.stage2_config("tiny", 2, "fp32"), media, 1)) and found["media"] == media


@pytest.mark.parametrize(
    ("option", "said"), [(["--implementation", "plain"], "the fast implementation"), (["--compile"], "an eager step")]
)
def test_what_cannot_be_profiled(option: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "stage2", *TINY, *option]) == 2
    assert said in capsys.readouterr().err


def test_fidelity_sees_what_eight_bits_lose() -> None:
    try:
        kernels.quantized_backend("int8", torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    config = stage1.stage1_config("tiny", 2, "fp32")
    video = torch.randint(256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    found = compare(config, "int8", [video], torch.device("cpu"))
    assert all(0.99 < cosine < 1 for cosine in found["cosine_per_layer"])
    assert found["mask_overlap"] > 0.9 and found["loss_int8"] == pytest.approx(found["loss_native"], abs=0.01)
    assert found["loss_int8"] != found["loss_native"]
    same = compare(config, "native", [video], torch.device("cpu"))
    assert same["mask_overlap"] == 1 and all(cosine > 0.99999 for cosine in same["cosine_per_layer"])


def test_impossible_precision_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "fidelity", "--model", "tiny", "--device", "cpu", "--precision", "fp8"]
    assert main(arguments) == 2
    assert "teacher.precision is 'fp8': fp8 has no backend on cpu" in capsys.readouterr().err
