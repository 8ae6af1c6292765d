"""Arguments that do not fit are refused by name; block sizes, warps and backends are the ones the kernels are tuned for."""

import functools
import importlib

import pytest
import torch

import kernels
from kernels._launch import power_of_two, rows_per_program, warps_for
from kernels.semantic_mask import tiling

SEEN, SEED = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([3])
VIDEO, X = torch.zeros(1, 2, 8, 16, 3, dtype=torch.uint8), torch.zeros(1, 4, 8)
ONE, NONE = torch.ones(1, 8), torch.zeros(1, 8)
HALF = (0.5, 0.5, 0.5)
STUDENT = torch.zeros(1, 1, 2, 8)
PACKED, TOTALS = torch.zeros(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)

REFUSED = {
    "dtype is torch.int8; it must be a floating one": lambda: kernels.fold_pixels(
        torch.ones(2, 3, 1, 4, 4), None, mean=(0.5,) * 3, std=(0.5,) * 3, dtype=torch.int8
    ),
    "dtype is torch.uint8, which holds no normalized pixels": lambda: kernels.patch_gather(
        torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8),
        SEEN[:, :1] * 0,
        patch_size=8,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        dtype=torch.uint8,
    ),
    "branch_scale is 0.5; it must be a tensor": lambda: kernels.layer_norm(
        X, ONE[0], NONE[0], branch=X, branch_scale=0.5
    ),
    r"weight and bias are torch.int32 \(8,\)": lambda: kernels.layer_norm(X, ONE[0].int(), NONE[0]),
    "mean and std together": lambda: kernels.patch_gather(VIDEO, SEEN, patch_size=8, mean=HALF),
    "only for uint8": lambda: kernels.patch_gather(
        torch.zeros(1, 3, 2, 8, 16), SEEN, patch_size=8, mean=HALF, std=HALF
    ),
    r"uint8 \(1, 2, 8, 16, 4\)": lambda: kernels.patch_gather(VIDEO[..., :1].repeat(1, 1, 1, 1, 4), SEEN, patch_size=8),
    r"torch.int32 \(1, 3, 2, 8, 16\)": lambda: kernels.patch_gather(
        torch.zeros(1, 3, 2, 8, 16, dtype=torch.int32), SEEN, patch_size=8
    ),
    "2 x 8 x 12 is not divisible": lambda: kernels.patch_gather(VIDEO[:, :, :, :12], SEEN, patch_size=8),
    "2 x 4 x 16 is not divisible": lambda: kernels.patch_gather(VIDEO[:, :, :4], SEEN, patch_size=8),
    "1 x 8 x 16 is not divisible": lambda: kernels.patch_gather(VIDEO[:, :1], SEEN, patch_size=8, tubelet_size=2),
    r"origin is torch.int64 \(2, 2\)": lambda: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, origin=torch.zeros(2, 2).long(), crop_size=(8, 8)
    ),
    r"origin is torch.float32 \(1, 2\)": lambda: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, origin=torch.zeros(1, 2), crop_size=(8, 8)
    ),
    r"to \(8, 17\), outside frames of 8 x 16": lambda: kernels.patch_gather(
        VIDEO, SEEN, patch_size=8, origin=torch.tensor([[0, 9]]), crop_size=(8, 8)
    ),
    r"visible is torch.float32 \(1, 2\)": lambda: kernels.token_gather(X, SEEN.float()),
    r"visible is torch.int32 \(1,\)": lambda: kernels.token_gather(X, SEEN[:, 0]),
    "x is torch.int32": lambda: kernels.token_gather(X.int(), SEEN),
    r"table has shape \(3, 8\)": lambda: kernels.token_gather(X, SEEN, torch.zeros(3, 8)),
    r"weight \(8,\) and bias \(7,\)": lambda: kernels.gather_norm(X, SEEN, ONE[0], NONE[0, :7]),
    r"weight \(7,\) and bias \(8,\)": lambda: kernels.gather_norm(X, SEEN, ONE[0, :7], NONE[0]),
    r"x is torch.float32 \(4, 8\)": lambda: kernels.gather_norm(X[0], None, ONE[0], NONE[0]),
    r"q \(1, 2, 8\) and k \(1, 3, 5, 8\)": lambda: kernels.semantic_mask(
        torch.zeros(1, 2, 8), torch.zeros(1, 3, 5, 8), 1, SEED
    ),
    r"q \(1, 2, 8\) and k \(1, 2, 5, 4\)": lambda: kernels.semantic_mask(
        torch.zeros(1, 2, 8), torch.zeros(1, 2, 5, 4), 1, SEED
    ),
    "scores are torch.float64": lambda: kernels.sample_visible(torch.ones(1, 4, dtype=torch.float64), 1, SEED),
    "with 2 elements": lambda: kernels.sample_visible(torch.ones(1, 4), 1, torch.tensor([3, 4])),
    r"weight \(1, 7\) must be": lambda: kernels.align_loss(STUDENT, STUDENT, ONE[:, :7], NONE),
    r"or bias \(1, 7\) not weight \(1, 8\)": lambda: kernels.align_loss(STUDENT, STUDENT, ONE, NONE[:, :7]),
    "loss is 'l3'": lambda: kernels.align_loss(STUDENT, STUDENT, ONE, NONE, loss="l3"),
    "normalize 'unit'": lambda: kernels.align_loss(STUDENT, STUDENT, ONE, NONE, normalize="unit"),
    r"k \(4, 1, 8\)": lambda: kernels.attention_varlen(PACKED, PACKED[:, :1], PACKED[:, :1], TOTALS, TOTALS, 4, 4),
    r"cu_seqlens_q \(2,\) as in \(3,\)": lambda: kernels.attention_varlen(
        PACKED, PACKED, PACKED, TOTALS, torch.tensor([0, 2, 4], dtype=torch.int32), 4, 4
    ),
    r"cu_seqlens_q \[1, 5\] must rise": lambda: kernels.attention_varlen(
        PACKED, PACKED, PACKED, TOTALS.where(TOTALS > 4, TOTALS + 1), TOTALS, 4, 4
    ),
    r"cu_seqlens_k \[0, 5, 4\] must rise": lambda: kernels.attention_varlen(
        PACKED, PACKED, PACKED, *(torch.tensor([0, n, 4], dtype=torch.int32) for n in (3, 5)), 5, 5
    ),
    r"cu_seqlens_q \[0, 3\] must rise": lambda: kernels.attention_varlen(
        PACKED, PACKED, PACKED, TOTALS.clamp(max=3), TOTALS, 4, 4
    ),
    "backend is 'fastest'": lambda: kernels.quantized_linear(
        NONE, torch.zeros(8, 8).to(torch.int8), ONE[0], NONE[0], backend="fastest"
    ),
    r"bias \(7,\)": lambda: kernels.quantized_linear(NONE, torch.zeros(8, 8).to(torch.int8), ONE[0], NONE[0, :7]),
    r"x \(1, 7\); they must be": lambda: kernels.quantized_linear(
        NONE[:, :7], torch.zeros(8, 8).to(torch.int8), ONE[0], NONE[0]
    ),
    r"x is torch.float64 \(1, 8\)": lambda: kernels.quantize_rows(ONE.double(), "int8"),
    r"x is torch.float32 \(1, 0\)": lambda: kernels.quantize_rows(ONE[:, :0], "int8"),
    r"x is torch.float32 \(1, 4, 8\)": lambda: kernels.quantize_rows(X, "int8"),
    "precision is 'int4'": lambda: kernels.quantize_rows(ONE, "int4"),
    "product is torch.float32": lambda: kernels.dequantize_product(ONE, ONE[:, :1], ONE[0], ONE[0], torch.float32),
    r"rows \(1, 8\)": lambda: kernels.dequantize_product(ONE.int(), ONE, ONE[0], ONE[0], torch.float32),
    r"scale \(7,\) and bias \(8,\) must be \(8,\)": lambda: kernels.dequantize_product(
        ONE.int(), ONE[:, :1], ONE[0, :7], ONE[0], torch.float32
    ),
    r"scale \(8,\) and bias \(7,\) must be \(8,\)": lambda: kernels.dequantize_product(
        ONE.int(), ONE[:, :1], ONE[0], ONE[0, :7], torch.float32
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        REFUSED[message]()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_has_no_gradient_says_so(backend: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    video = torch.zeros(1, 3, 2, 8, 16, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"pass video.detach\(\)"):
        kernels.patch_gather(video, SEEN.to(device), patch_size=8, backend=backend)
    table = torch.zeros(4, 8, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"table requires a gradient and would get none; pass table.detach\(\)"):
        kernels.token_gather(torch.zeros(1, 4, 8, device=device), SEEN.to(device), table, backend=backend)


def test_block_sizes_and_warps() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 64, 65, 768)] == [1, 2, 4, 64, 128, 1024]
    assert [warps_for(n) for n in (16, 768, 1024, 1408, 8192, 16384)] == [1, 1, 1, 2, 8, 8]
    # 6 layers of 64 clips with 320 tokens each: about 4000 programs.
    assert [rows_per_program(n) for n in (1, 6 * 64 * 320, 10**7)] == [4, 32, 64]
    assert tiling(196, 64, 2) == {"BLOCK": 256, "BLOCK_D": 64, "STAGES": 3, "num_warps": 8}
    assert tiling(196, 80, 2) == {"BLOCK": 256, "BLOCK_D": 64, "STAGES": 2, "num_warps": 8}
    assert tiling(196, 128, 4) == {"BLOCK": 256, "BLOCK_D": 32, "STAGES": 1, "num_warps": 8}
    assert tiling(576, 64, 2) == {"BLOCK": 1024, "BLOCK_D": 16, "STAGES": 2, "num_warps": 16}


def test_the_backend_of_attention_on_a_gpu_that_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    module, gpu = importlib.import_module("kernels.attention"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "_FLASH_ATTN", False)
    kinds = [(torch.bfloat16, 64, True), (torch.bfloat16, 64, False), (torch.float32, 64, True)]
    kinds += [(torch.bfloat16, 12, True), (torch.float16, 256, True), (torch.float16, 264, True)]
    backends = [module.attention_backend(gpu, dtype, width, packed=packed) for dtype, width, packed in kinds]
    assert backends == ["varlen", "sdpa", "sdpa", "sdpa", "varlen", "sdpa"]
    monkeypatch.setattr(module, "_FLASH_ATTN", True)
    backends = [module.attention_backend(gpu, dtype, width, packed=packed) for dtype, width, packed in kinds]
    assert backends == ["flash_attn", "flash_attn", "sdpa", "flash_attn", "flash_attn", "sdpa"]
    q, mask = torch.randn(1, 3, 2, 8), torch.tensor([[True, False, True]])
    assert module.attention_backend(q.device, torch.float32, 64) == "sdpa"
    with pytest.raises(ValueError, match="'flash_attn' needs CUDA tensors, these are on cpu"):
        kernels.attention(q, q, q, backend="flash_attn")
    # A mask that the library cannot take goes to sdpa instead.
    monkeypatch.setattr(module, "attention_backend", lambda *args, **kwargs: "flash_attn")
    torch.testing.assert_close(
        kernels.attention(q, q, q, key_mask=mask), kernels.attention(q, q, q, key_mask=mask, backend="math")
    )


def test_the_varlen_backend_passes_lengths_and_scale_on(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kernels.attention")
    q, k, v = torch.randn(3, 7, 2, 8)
    places = (*(torch.tensor([0, 4, 7], dtype=torch.int32),) * 2, 4, 4)
    monkeypatch.setattr(module, "_why_not_varlen", lambda *args: None)
    monkeypatch.setattr(module, "varlen_attn", functools.partial(kernels.attention_varlen, backend="math"))
    for scale in (None, 0.7):
        ours = kernels.attention_varlen(q, k, v, *places, scale=scale, backend="varlen")
        torch.testing.assert_close(ours, kernels.attention_varlen(q, k, v, *places, scale=scale, backend="math"))
