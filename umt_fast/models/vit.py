"""The one video ViT: the student of pre-training, the classifier's backbone, the vision tower of stage 2.

Legend: B clips, T token frames, L tokens per frame, N = T * L, n visible tokens per clip, C width, H heads.
Parameter names are those of the official implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from umt_fast.config import IMAGENET_MEAN, IMAGENET_STD, VitConfig
from umt_fast.masking import TokenGrid
from umt_fast.models.attention import Attends
from umt_fast.models.linear import Linear, Multiplies


def sinusoid_table(positions: int, width: int) -> Tensor:
    """(positions, width) fp32: sin(n / 10000^(2*floor(j/2)/C)) on even channels j, cos on odd ones.

    One table over the flat index n of the whole clip, not factorized over space and time; computed in float64.
    """
    channel = torch.arange(width)
    rate = 10000.0 ** (2 * (channel // 2).double() / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def resized_table(table: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
    """A position table (old.size, C) for another grid (new.size, C): bicubic within a frame, linear over time.

    The official rule for more frames or pixels than pre-training had (half-pixel centers, no antialiasing).
    """
    if old == new:
        return table
    width = table.shape[1]
    maps = table.view(old.frames, old.rows, old.columns, width).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, (new.rows, new.columns), mode="bicubic", align_corners=False)
    lines = maps.permute(2, 3, 1, 0).flatten(0, 1)
    lines = F.interpolate(lines, new.frames, mode="linear", align_corners=False)
    return lines.permute(2, 0, 1).reshape(new.size, width)


def position_table(config: VitConfig) -> Tensor:
    """(N, C) fp32 positions of a clip: the sinusoids of config.position_grid, or of the clip's own, resized to the clip's."""
    made_for = TokenGrid(*(config.position_grid or config.grid))
    return resized_table(sinusoid_table(made_for.size, config.width), made_for, TokenGrid(*config.grid))


class Packing(NamedTuple):
    """Batches of token sequences one after the other along one axis; in a batch all are equally long."""

    shapes: tuple[tuple[int, int], ...]
    """(sequences, tokens of each) of each batch."""
    totals: Tensor
    """int32 (S + 1,), where each sequence starts."""

    @classmethod
    def of(cls, batches: Sequence[Tensor]) -> Packing:
        """The packing of batches (B, n, C)."""
        shapes = tuple((x.shape[0], x.shape[1]) for x in batches)
        # Made on the device: a list of numbers would have to be copied there.
        parts, start = [], 0
        for count, n in shapes:
            parts.append(torch.arange(start, start + count * n, n, dtype=torch.int32, device=batches[0].device))
            start += count * n
        last = torch.full((1,), start, dtype=torch.int32, device=batches[0].device)
        return cls(shapes, torch.cat([*parts, last]))

    @property
    def longest(self) -> int:
        return max(n for _, n in self.shapes)

    def split(self, x: Tensor, dim: int = 0) -> list[Tensor]:
        """The batches, with (sequences, tokens) in place of the packed axis."""
        parts = x.split([count * n for count, n in self.shapes], dim)
        return [part.unflatten(dim, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def per_token(self, values: Tensor) -> Tensor:
        """(S, 1), one value for each sequence -> one for each of its tokens, (total, 1)."""
        parts = values.split([count for count, _ in self.shapes])
        return torch.cat([v.expand(shape).reshape(-1, 1) for v, shape in zip(parts, self.shapes, strict=True)])


def path_factors(x: Tensor, rate: float, packing: Packing | None = None) -> Tensor:
    """Stochastic depth of one branch: for each sample of x (B, ...) 0 with probability `rate`, else 1 / (1 - rate).

    fp32, of a shape that multiplies x. With a packing x is (total, C), and a sample is a sequence.
    """
    keep = 1 - rate
    samples = x.shape[0] if packing is None else len(packing.totals) - 1
    factors = (torch.rand((samples,) + (1,) * (x.ndim - 1), device=x.device) < keep).float().div_(keep)
    return factors if packing is None else packing.per_token(factors)


class PatchEmbed(nn.Module):
    """Holds the Conv3d weight under its official name and applies it as one matrix product over visible patches."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        patch = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, patch, patch)

    def forward(self, video: Tensor, visible: Tensor) -> Tensor:
        """Video uint8 (B, T, H, W, 3) or normalized (B, 3, T, H, W), visible (B, n) -> (B, n, C)."""
        weight = self.proj.weight
        autocast = torch.is_autocast_enabled(video.device.type)
        dtype = torch.get_autocast_dtype(video.device.type) if autocast else weight.dtype
        pixels = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if video.dtype == torch.uint8 else {}
        rows = kernels.patch_gather(
            video, visible, patch_size=weight.shape[-1], tubelet_size=weight.shape[2], dtype=dtype, **pixels
        )
        return kernels.library_linear(rows, weight.flatten(1), self.proj.bias)


class Attention(Attends):
    """Multi-head self-attention whose key bias is always zero: it would not change the softmax."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """(B, n, C), or packed (total, C) -> the same."""
        return self.proj(self.heads(kernels.library_linear(x, self.qkv.weight, self.qkv_bias), packing))

    @property
    def qkv_bias(self) -> Tensor:
        """(3C,), zero for the keys."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def heads(self, qkv: Tensor, packing: Packing | None = None) -> Tensor:
        """(..., 3C) -> (..., C), the heads' outputs side by side."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        if packing is None:
            out = kernels.attention_qkv(qkv, prefer=self.attention_backend)
        else:
            q, k, v = qkv.unbind(-3)
            totals, longest = packing.totals, packing.longest
            places = (totals, totals, longest, longest)
            out = kernels.attention_varlen(q, k, v, *places, prefer=self.attention_backend)
        return out.flatten(-2)


class _GeluLinear(torch.autograd.Function):
    """F.linear(F.gelu(x), weight, bias) that keeps x alone for the backward pass, not GELU's output beside it.

    That is a fifth of what a block keeps, for one pass more over x. All of one dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return kernels.library_linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Not kept by a name: it would stand beside what the next product reads.
            grad_x = torch.ops.aten.gelu_backward(kernels.library_product(rows, weight.t()).view(x.shape), x)
        if ctx.needs_input_grad[1]:
            grad_weight = kernels.library_product(rows.t(), F.gelu(x).flatten(0, -2).t())
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.fc2(F.gelu(hidden))  # a compiler itself weighs what to keep
        # Cast here, as autocast would: inside the function nothing is.
        return _GeluLinear.apply(hidden, self.fc2.weight.to(hidden.dtype), self.fc2.bias.to(hidden.dtype))


class Block(Multiplies):
    """Pre-LN transformer block with stochastic depth.

    What is dropped is drawn by `draw`, outside forward: blocks differ in their rates alone, and one compiled forward serves
    all of them, with the numbers that an eager one would have.
    """

    def __init__(self, config: VitConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.drop_path = drop_path

    def draw(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor] | None:
        """The factors of both branches for a forward of x, or None where nothing is dropped."""
        if not self.training or self.drop_path == 0:
            return None
        return path_factors(x, self.drop_path, packing), path_factors(x, self.drop_path, packing)

    def forward(
        self, x: Tensor, packing: Packing | None = None, factors: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x: (B, n, C), or packed (total, C); factors as `draw` gives them."""
        if self.linear_backend == "fused":
            return self._fused(x, packing, factors)
        branch = self.attn(self.norm1(x), packing)
        x = x + (branch if factors is None else branch * factors[0].to(branch.dtype))
        branch = self.mlp(self.norm2(x))
        return x + (branch if factors is None else branch * factors[1].to(branch.dtype))

    def _fused(self, x: Tensor, packing: Packing | None, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        """forward by products that carry bias, GELU and the last sum; the first sum goes with the norm behind it."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        attn, mlp, first, second = self.attn, self.mlp, self.norm1, self.norm2
        options = {"dtype": dtype, "backend": "triton"}
        attn_scale, mlp_scale = factors or (None, None)
        normed, x = kernels.layer_norm(x, first.weight, first.bias, first.eps, with_stream=True, **options)
        heads = attn.heads(kernels.linear(normed, attn.qkv.weight, attn.qkv_bias, backend="triton"), packing)
        branch = kernels.linear(heads, attn.proj.weight, attn.proj.bias, backend="triton")
        normed, x = kernels.layer_norm(
            x, second.weight, second.bias, second.eps, branch=branch, branch_scale=attn_scale, **options
        )
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        return kernels.mlp(normed, *weights, residual=x, branch_scale=mlp_scale, backend="triton")


def draw_linear(module: nn.Module) -> None:
    """Draws the matrices of all linear layers anew as fine-tuning does officially; their biases stay zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-2, b=2)


class VisionTransformer(nn.Module):
    """A pre-LN ViT over the visible tokens of a clip, without class token (paper section 4.1).

    The final `norm` is held but applied by the caller: pre-training norms K intermediate features, the classifier replaces it.
    """

    def __init__(self, config: VitConfig, *, with_norm: bool = True) -> None:
        super().__init__()
        self.config = config
        self.grid = TokenGrid.of(
            num_frames=config.num_frames,
            tubelet_size=config.tubelet_size,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
        self.patch_embed = PatchEmbed(config)
        rates = [config.drop_path * depth / max(1, config.depth - 1) for depth in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6) if with_norm else None
        self.register_buffer("position", position_table(config), persistent=False)
        self.register_buffer("every", torch.arange(self.grid.size, dtype=torch.int32), persistent=False)
        self.apply(_initialize)

    @property
    def shard_units(self) -> list[nn.Module]:
        """The modules whose parameters are used in their own forward alone, in its order."""
        return list(self.blocks)

    def pieces(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods whose gradients are ready together: patches, and each block."""
        return [(self, "_tokens"), *((block, "forward") for block in self.blocks)]

    def all_visible(self, batch: int) -> Tensor:
        """Indices (B, N) of an unmasked clip."""
        return self.every.expand(batch, -1)

    def forward(self, video: Tensor, visible: Tensor | None = None, num_layers: int = 1) -> list[Tensor]:
        """The outputs of the last `num_layers` blocks, shallowest first, each (B, n, C), before the final norm.

        video: uint8 (B, T, H, W, 3) or normalized floating (B, 3, T, H, W). visible: int32 (B, n) ascending flat
        indices, or None for all N. With spatial attention every frame must have the same number of visible tokens.
        visible may also be (B * M, n), M views of each clip, the views of a clip side by side: outputs are then (B * M, n, C).
        """
        visible = self.all_visible(video.shape[0]) if visible is None else visible
        x = self._tokens(video, visible)
        batch = x.shape[0]
        if self.config.attention == "spatial":
            # Counted in the video: an image has fewer frames than the clips that the tower is made for.
            frames = video.shape[1] if video.dtype == torch.uint8 else video.shape[2]
            x = x.reshape(batch * (frames // self.config.tubelet_size), -1, x.shape[-1])
        return [feature.reshape(batch, -1, feature.shape[-1]) for feature in self._blocks(x, num_layers)]

    def packed(self, batches: Sequence[tuple[Tensor, Tensor]], num_layers: int = 1) -> tuple[list[Tensor], Packing]:
        """As forward for several batches (video, visible) of different lengths at once, joint attention only.

        Returns the intermediate features, each (total, C), and where in them each batch lies.
        """
        tokens = [self._tokens(video, visible) for video, visible in batches]
        packing = Packing.of(tokens)
        return self._blocks(torch.cat([x.flatten(0, 1) for x in tokens]), num_layers, packing), packing

    def _tokens(self, video: Tensor, visible: Tensor) -> Tensor:
        # All views of a clip are read from the same pixels. The fp32 table keeps the residual stream fp32 under autocast.
        tokens = self.patch_embed(video, visible.reshape(video.shape[0], -1))
        return tokens.view(*visible.shape, -1) + self.position[visible]

    def _blocks(self, x: Tensor, num_layers: int, packing: Packing | None = None) -> list[Tensor]:
        features = []
        for depth, block in enumerate(self.blocks):
            factors = block.draw(x, packing)
            if depth < self.config.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, packing, factors, use_reentrant=False)
            else:
                x = block(x, packing, factors)
            if depth >= len(self.blocks) - num_layers:
                features.append(x)
        return features


def _initialize(module: nn.Module) -> None:
    """Official initialization: xavier-uniform Linear weights, zero biases; the Conv3d keeps PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
