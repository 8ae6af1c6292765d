"""What bench_kernels.py times: each operation at the shapes of a training step, by several providers.

`ours` is the public function on the tensor's own backend (Triton on a GPU, the reference on a CPU), `plain` the reference
forced, `compiled` the reference under torch.compile (GPU only), `textbook` what the official implementation does for the
same result.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
# (student width, heads, output width, clips, pixels per side)
SIZES = {"tiny": (192, 3, 128, 2, 112), "b16": (768, 12, 512, 64, 224), "l16": (1024, 16, 768, 64, 224)}
SIZE = os.environ.get("UMT_BENCH", "b16" if DEVICE.type == "cuda" else "tiny")
FRAMES, PATCH = 8, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operation: its providers, and the bytes and FLOPs its definition needs."""

    name: str
    providers: dict[str, Call]
    bytes_moved: float = 0.0
    flops: float = 0.0


def _providers(ours: Callable[[str], object], textbook: Call | None = None) -> dict[str, Call]:
    """ours takes a backend."""
    calls: dict[str, Call] = {"ours": lambda: ours("auto"), "plain": lambda: ours("reference")}
    if DEVICE.type == "cuda":
        compiled = torch.compile(lambda: ours("reference"), dynamic=False)
        calls["compiled"] = compiled
    if textbook is not None:
        calls["textbook"] = textbook
    return calls


def _backward(forward: Callable[[str], Tensor], leaves: list[Tensor]) -> dict[str, Call]:
    """The backward pass alone, over a graph recorded at a provider's first call."""

    @functools.cache
    def recorded(name: str) -> tuple[Tensor, Tensor]:
        if name == "compiled":
            out = torch.compile(lambda: forward("reference"), dynamic=False)()
        else:
            out = forward("auto" if name == "ours" else "reference")
        return out, torch.randn_like(out)

    def gradients(name: str) -> tuple[Tensor, ...]:
        out, upstream = recorded(name)
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    names = ("ours", "plain", "compiled") if DEVICE.type == "cuda" else ("ours", "plain")
    return {name: functools.partial(gradients, name) for name in names}


def cases() -> Iterator[Case]:
    """Every case at the size UMT_BENCH names."""
    torch.manual_seed(0)
    width, heads, out, batch, pixels = SIZES[SIZE]
    tokens = (pixels // PATCH) ** 2
    kept = tokens - int(tokens * 0.8)
    rows, every, element = batch * FRAMES * kept, FRAMES * tokens, DTYPE.itemsize
    seed = torch.tensor([1], device=DEVICE)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=DTYPE)

    scores = torch.rand(batch * FRAMES, tokens, device=DEVICE)
    frame = kernels.sample_visible(scores, kept, seed)
    shift = torch.arange(FRAMES, device=DEVICE, dtype=torch.int32)[None, :, None] * tokens
    visible = (frame.view(batch, FRAMES, kept) + shift).flatten(1)

    video = torch.randint(256, (batch, FRAMES, pixels, pixels, 3), dtype=torch.uint8, device=DEVICE)
    options = {"patch_size": PATCH, "mean": MEAN, "std": STD, "dtype": DTYPE}
    mean, std = (torch.tensor(values, device=DEVICE) for values in (MEAN, STD))
    hidden = torch.ones(batch, every, dtype=torch.bool, device=DEVICE).scatter_(1, visible.long(), False)

    def dense_patches() -> Tensor:
        normal = ((video / 255 - mean) / std).to(DTYPE)
        side = pixels // PATCH
        patches = normal.view(batch, FRAMES, side, PATCH, side, PATCH, 3).permute(0, 1, 2, 4, 6, 3, 5)
        return patches.reshape(batch, every, -1)[~hidden].view(batch, -1, 3 * PATCH**2)

    yield Case(
        "patch_gather",
        _providers(lambda backend: kernels.patch_gather(video, visible, backend=backend, **options), dense_patches),
        rows * 3 * PATCH**2 * (1 + element),
    )
    everything = torch.arange(every, device=DEVICE, dtype=torch.int32).expand(batch, -1)
    last = options | {"order": "channels_last"}
    yield Case(
        "patch_gather channels_last",
        _providers(lambda backend: kernels.patch_gather(video, everything, backend=backend, **last)),
        batch * every * 3 * PATCH**2 * (1 + element),
    )

    x, table = floats(batch, every, width).requires_grad_(), torch.randn(every, width, device=DEVICE)
    plain_x = x.detach()

    def boolean_gather() -> Tensor:
        return (plain_x + table.to(DTYPE))[~hidden].view(batch, -1, width)

    yield Case(
        "token_gather forward",
        _providers(lambda backend: kernels.token_gather(plain_x, visible, table, backend=backend), boolean_gather),
        rows * width * 2 * element + every * width * 4,
    )
    yield Case(
        "token_gather backward",
        _backward(lambda backend: kernels.token_gather(x, visible, table, backend=backend), [x]),
        (rows + batch * every) * width * element,
    )
    affine = [torch.rand(width, device=DEVICE) for _ in range(2)]
    yield Case(
        "gather_norm",
        _providers(lambda backend: kernels.gather_norm(plain_x, visible, *affine, backend=backend)),
        rows * width * 2 * element,
    )

    q, k = floats(batch * FRAMES, heads, 64), floats(batch * FRAMES, 1 + tokens, 2, heads, 64)[:, :, 0].transpose(1, 2)

    def full_map() -> Tensor:
        whole = torch.cat([q[:, :, None], k[:, :, 1:]], 2)
        attention = ((whole * 64**-0.5) @ k.transpose(2, 3)).softmax(-1).mean(1)[:, 0, 1:]
        drawn = torch.multinomial(attention.float(), tokens)[:, :kept]
        mask = torch.ones(batch * FRAMES, tokens, dtype=torch.bool, device=DEVICE).scatter_(1, drawn, False)
        return (~mask).nonzero()

    yield Case(
        "semantic_mask",
        _providers(lambda backend: kernels.semantic_mask(q, k, kept, seed, backend=backend), full_map),
        batch * FRAMES * (2 + tokens) * heads * 64 * element,
    )

    yield from _align_cases(batch, FRAMES * kept, out)
    yield from _quantized_cases(batch * FRAMES * (1 + tokens), width)
    # What the student, the teacher and a fine-tuned classifier ask for: rows of tokens that see each other.
    lengths = {
        "visible tokens": (batch, FRAMES * kept),
        "tokens of a frame": (batch * FRAMES, 1 + tokens),
        "all tokens": (max(1, batch // 4), every),
    }
    yield from _attention_cases(lengths, heads)


def _align_cases(batch: int, visible: int, channels: int) -> Iterator[Case]:
    """Six layers of a student against its teacher."""
    shape, element = (6, batch, visible, channels), DTYPE.itemsize
    student = torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)
    target = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    weight, bias = (torch.rand(6, channels, device=DEVICE).requires_grad_() for _ in range(2))
    yield Case(
        "align_loss forward",
        _providers(lambda backend: kernels.align_loss(student.detach(), target, weight, bias, backend=backend)),
        student.numel() * 2 * element,
    )
    yield Case(
        "align_loss backward",
        _backward(
            lambda backend: kernels.align_loss(student, target, weight, bias, backend=backend), [student, weight, bias]
        ),
        student.numel() * 3 * element,
    )


def _attention_cases(lengths: dict[str, tuple[int, int]], heads: int) -> Iterator[Case]:
    """lengths: sequences and the tokens of each, by name."""
    for name, (count, length) in lengths.items():
        backends = dict(_attention_backends(torch.randn(3, count, length, heads, 64, device=DEVICE, dtype=DTYPE)))
        yield Case(f"attention, {name}", backends, flops=4 * count * heads * length**2 * 64)


def _quantized_cases(rows: int, width: int) -> Iterator[Case]:
    """The linear layers of a teacher in 8 bits: each step alone, then the widest layer whole; textbook is that in DTYPE."""
    element, wide = DTYPE.itemsize, 4 * width
    precisions = ("int8", "fp8")
    for channels in (width, wide):
        x = torch.randn(rows, channels, device=DEVICE, dtype=DTYPE)
        for precision in precisions:
            call = functools.partial(kernels.quantize_rows, x, precision)
            yield Case(
                f"quantize_rows {precision} {channels}",
                _providers(lambda backend, call=call: call(backend=backend)),
                rows * channels * (element + 1),
            )
    x, affine = torch.randn(rows, width, device=DEVICE, dtype=DTYPE), torch.randn(2, width, device=DEVICE)
    for precision in precisions:
        call = functools.partial(kernels.norm_quantize, x, *affine, precision)
        yield Case(
            f"norm_quantize {precision} {width}",
            _providers(lambda backend, call=call: call(backend=backend)),
            rows * width * (element + 1),
        )
    product = torch.randint(-(2**20), 2**20, (rows, wide), dtype=torch.int32, device=DEVICE)
    scales, bias = torch.rand(rows, 1, device=DEVICE), torch.randn(wide, device=DEVICE)
    yield Case(
        "dequantize_product",
        _providers(lambda backend: kernels.dequantize_product(product, scales, bias, bias, DTYPE, backend=backend)),
        rows * wide * (4 + element),
    )
    x, weight = torch.randn(rows, width, device=DEVICE, dtype=DTYPE), torch.randn(wide, width, device=DEVICE)
    for precision in precisions:
        try:
            kernels.quantized_backend(precision, DEVICE)
        except ValueError:
            continue  # not for this device
        layer = functools.partial(kernels.quantized_linear, x, *kernels.quantize_weight(weight, precision), bias)
        providers = {"ours": layer, "plain": functools.partial(_plain, layer)}
        if DEVICE.type == "cuda":
            providers["compiled"] = torch.compile(layer, dynamic=False)
        providers["textbook"] = functools.partial(F.linear, x, weight.to(DTYPE), bias.to(DTYPE))
        yield Case(f"quantized_linear {precision}", providers, flops=2 * rows * width * wide)


def _plain(call: Call) -> object:
    with kernels.force_backend("reference"):
        return call()


def _attention_backends(qkv: Tensor) -> Iterator[tuple[str, Call]]:
    q, k, v = qkv.unbind(0)
    yield "ours", lambda: kernels.attention(q, k, v)
    for backend in ("math", "flash_attn", "xformers", "flash", "efficient", "cudnn"):
        try:
            kernels.attention(q[:1], k[:1], v[:1], backend=backend)
        except ValueError:
            continue  # not installed, or not for this device: the table shows what is there
        yield (
            "plain" if backend == "math" else backend,
            lambda backend=backend: kernels.attention(q, k, v, backend=backend),
        )
