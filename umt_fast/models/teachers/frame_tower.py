"""A frozen ViT with a class token over the frames of a clip, computing only what pre-training uses.

Legend: R = B * T frames, L patch tokens per frame, m visible tokens per frame, n = T * m per view, M views (masks) of a clip,
C width, K layers, D output width. Parameter names are those of OpenAI CLIP's `visual.` part; weights of other towers are
given these names.

What it leaves out of the textbook forward (all of it exact): the last block's attention map except the class token's
row; that block's queries, output projection and MLP at hidden tokens; ln_post and the projection at hidden tokens of all
K intermediate features; and every gradient record.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import library
from umt_fast.config import IMAGENET_MEAN, IMAGENET_STD, MaskConfig, TeacherConfig, TeacherPrecision
from umt_fast.masking import ClassAttention, TokenGrid, mask_named, seed_of_view
from umt_fast.models.attention import Attends
from umt_fast.models.linear import Multiplies
from umt_fast.models.resize import bicubic
from umt_fast.models.teachers.base import TeacherOutput
from umt_fast.models.teachers.quantized import QuantizedBlock, QuantizedLinear


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose statistics and fp32 parameters stay exact when the tower computes in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        # Eager on a GPU, one kernel moves a fifth of the bytes of cast, norm and cast; a compiler fuses those itself.
        if x.is_cuda and x.dtype != torch.float32 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            rows = x.reshape(-1, *x.shape[-2:])
            return kernels.gather_norm(rows, None, self.weight, self.bias, eps=self.eps).view(x.shape)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            # One pass, its statistics in fp32 too.
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return super().forward(x.float()).to(x.dtype)


class Attention(Attends):
    """The parameters of multi-head attention, by CLIP's names."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def project(self, x: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """Some of (q, k, v), each (..., H, head dim): parts is a slice of range(3)."""
        width = x.shape[-1]
        rows = slice(parts.start * width, parts.stop * width)
        if parts == slice(0, 3) and not torch.is_grad_enabled():
            # A slice is made anew at each call: only the whole weight can be kept packed.
            out = kernels.frozen_linear(x, self.in_proj_weight, self.in_proj_bias)
        else:
            out = kernels.library_linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return out.unflatten(-1, (parts.stop - parts.start, self.num_heads, -1)).unbind(-3)


class Mlp(nn.Module):
    """Linear, GELU (CLIP's x * sigmoid(1.702 x), or the exact one), Linear."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return self.c_proj(F.gelu(self.c_fc(x)))
        if torch.is_grad_enabled():
            hidden = self.c_fc(x)
            return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))
        # x * sigmoid(ax) = silu(ax) / a: a pass in place, and both factors ride on the matrix products.
        scaled = torch.addmm(self.c_fc.bias * 1.702, x.flatten(0, -2), self.c_fc.weight.t(), alpha=1.702)
        out = torch.addmm(self.c_proj.bias, F.silu(scaled, inplace=True), self.c_proj.weight.t(), alpha=1 / 1.702)
        return out.view(*x.shape)


class Block(Multiplies):
    """A pre-norm block, whole or finished for some tokens only."""

    def __init__(self, config: TeacherConfig, eps: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width, eps)
        self.attn = Attention(config.width, config.num_heads)
        self.ln_2 = LayerNorm(config.width, eps)
        self.mlp = Mlp(config.width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(R, 1 + L, C) -> the same."""
        if self.linear_backend == "fused":
            qkv = self._after_norm(x, "in_proj", "none")
            q, k, v = qkv.unflatten(-1, (3, self.attn.num_heads, -1)).unbind(-3)
        else:
            q, k, v = self.attn.project(self.ln_1(x), slice(0, 3))
        return self.finish(x, q, k, v)

    def fuse(self, dtype: torch.dtype) -> None:
        """Computes by fused products from now on."""
        attn, mlp = self.attn, self.mlp
        super().fuse(dtype)
        for name, norm, weight, bias in (
            ("in_proj", self.ln_1, attn.in_proj_weight, attn.in_proj_bias),
            ("c_fc", self.ln_2, mlp.c_fc.weight, mlp.c_fc.bias),
        ):
            weight, bias, deferred = kernels.defer_norm(weight, bias, norm.weight, norm.bias, norm.eps, dtype)
            for part, value in (("weight", weight), ("bias", bias), ("column", deferred.column)):
                self.register_buffer(f"{name}_{part}", value, persistent=False)

    def _after_norm(self, x: Tensor, name: str, activation: str) -> Tensor:
        """act(LayerNorm(x) @ W.T + b) of the layer `name`, its norm deferred behind its product."""
        weight, bias, column = (getattr(self, f"{name}_{part}") for part in ("weight", "bias", "column"))
        norm = kernels.DeferredNorm(column, self.ln_1.eps)
        return kernels.linear(x, weight, bias, activation=activation, norm=norm, backend="triton")

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The block's output for the tokens x (R, m, C) whose queries are q (R, m, H, d), given all keys and values."""
        heads = kernels.attention(q, k, v, prefer=self.attn.attention_backend).flatten(2)
        out = self.attn.out_proj
        if self.linear_backend == "fused":
            x = kernels.linear(heads, out.weight, out.bias, residual=x, backend="triton")
            hidden = self._after_norm(x, "c_fc", self.mlp.activation)
            second = self.mlp.c_proj
            return kernels.linear(hidden, second.weight, second.bias, residual=x, backend="triton")
        if torch.is_grad_enabled() or not library.packs(x, out.weight):
            x = x + out(heads)
            return x + self.mlp(self.ln_2(x))
        x = x + kernels.frozen_linear(heads, out.weight, out.bias)
        return self._packed_mlp(x)

    def _packed_mlp(self, x: Tensor) -> Tensor:
        """x + mlp(ln_2(x)), each of the two products with all that follows it up to the other."""
        norm, first, second = self.ln_2, self.mlp.c_fc, self.mlp.c_proj
        if self.mlp.activation == "gelu":
            hidden = kernels.frozen_linear(norm(x), first.weight, first.bias, activation="gelu")
            return x + kernels.frozen_linear(hidden, second.weight, second.bias)
        # x * sigmoid(ax) = silu(ax) / a: the one factor rides on the norm, the other on the sum.
        factor = 1.702
        y = F.layer_norm(x, norm.normalized_shape, norm.weight * factor, norm.bias * factor, norm.eps)
        hidden = kernels.frozen_linear(y, first.weight, first.bias * factor, activation="silu")
        out = kernels.frozen_linear(hidden, second.weight, second.bias * factor)
        return torch.add(x, out, alpha=1 / factor)


def _forget_pixels(tower: FrameTower, _: object) -> None:
    tower.patch_rows = tower.patch_positions = None


class FrameTower(nn.Module):
    """An image encoder over the frames of a clip, frozen: parameters take no gradient, forward records none."""

    precisions: ClassVar[tuple[TeacherPrecision, ...]] = ("native", "int8", "fp8")

    def __init__(
        self,
        config: TeacherConfig,
        num_layers: int,
        tubelet_size: int,
        *,
        eps: float,
        norm_first: bool,
        patch_bias: bool,
        projects: bool,
    ) -> None:
        """eps: of its LayerNorms. norm_first: one stands before the blocks. patch_bias: the patch embedding has a bias.
        projects: outputs are projected to config.output_dim; else they are as wide as the tower."""
        super().__init__()
        self.config, self.num_layers = config, num_layers
        patch = (tubelet_size, config.patch_size, config.patch_size)
        self.conv1 = nn.Conv3d(3, config.width, patch, patch, bias=patch_bias)
        side = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(config.width**-0.5 * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(config.width**-0.5 * torch.randn(side * side + 1, config.width))
        self.ln_pre = LayerNorm(config.width, eps) if norm_first else nn.Identity()
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(config, eps) for _ in range(config.depth))})
        self.ln_post = LayerNorm(config.width, eps)
        self.proj = (
            nn.Parameter(config.width**-0.5 * torch.randn(config.width, config.output_dim)) if projects else None
        )
        self.register_buffer("pixel_mean", 255 * torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(IMAGENET_STD), persistent=False)
        # conv1 and the positions for whole numbers in place of normalized pixels, by compute_in; loaded weights are others.
        self.register_buffer("patch_rows", None, persistent=False)
        self.register_buffer("patch_positions", None, persistent=False)
        self.pixels: dict[str, object] = {}
        self.register_load_state_dict_post_hook(_forget_pixels)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrameTower:
        """Stays in evaluation mode."""
        return super().train(False)

    def compute_in(self, dtype: torch.dtype) -> FrameTower:
        """Casts the matrix weights once; LayerNorms stay fp32. No autocast is then needed, nor any cast per step.

        The patch embedding then takes whole numbers of uint8 video: ImageNet's std goes into its weight before that is rounded.
        """
        statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        folded = kernels.fold_pixels(self.conv1.weight, self.conv1.bias, dtype=dtype, **statistics)
        positions = self.positional_embedding.float()
        # The bias goes into the positions: both are added to every token, and so it is rounded with them.
        positions = torch.cat([positions[:1], positions[1:] + folded.bias])
        self.patch_rows, self.patch_positions = folded.weight, positions.to(dtype)
        self.pixels = folded.pixels
        for module in self.modules():
            if not isinstance(module, (LayerNorm, QuantizedLinear)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        return self

    def quantize(self, precision: TeacherPrecision) -> FrameTower:
        """Computes the large products of all blocks but the last in 8 bits from now on (`native` changes nothing).

        The last block draws the mask and costs 3% of the tower's work at B/16: it stays exact.
        """
        if precision != "native":
            for depth, block in enumerate(self.blocks[:-1]):
                self.blocks[depth] = QuantizedBlock(block, precision)
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer["resblocks"]

    def _frames(self, video: Tensor) -> Tensor:
        """The video at the teacher's resolution; uint8 stays uint8 where no resize is needed."""
        size = self.config.image_size
        height = video.shape[2] if video.dtype == torch.uint8 else video.shape[3]
        if height == size:
            return video
        if video.dtype == torch.uint8:
            frames = ((video - self.pixel_mean) / self.pixel_std).flatten(0, 1).permute(0, 3, 1, 2)
            batch = video.shape[0]
        else:
            batch = video.shape[0]
            frames = video.transpose(1, 2).flatten(0, 1)
        # The official resize: fp32, bicubic, no antialiasing.
        frames = frames.float()
        if frames.is_cuda and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            frames = bicubic(frames, (size, size))
        else:
            frames = F.interpolate(frames, (size, size), mode="bicubic", align_corners=False)
        return frames.unflatten(0, (batch, -1)).transpose(1, 2)

    def embed(self, video: Tensor) -> Tensor:
        """Video -> (R, 1 + L, C), the class token first, as the blocks get it."""
        weight = self.conv1.weight
        video = self._frames(video)
        folded = video.dtype == torch.uint8 and self.patch_rows is not None
        if folded:
            pixels = self.pixels
        else:
            pixels = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if video.dtype == torch.uint8 else {}
        tubelet, per_frame = weight.shape[2], self.positional_embedding.shape[0] - 1
        frames = (video.shape[1] if video.dtype == torch.uint8 else video.shape[2]) // tubelet
        every = torch.arange(frames * per_frame, device=video.device, dtype=torch.int32).expand(video.shape[0], -1)
        rows = kernels.patch_gather(
            video, every, patch_size=weight.shape[-1], tubelet_size=tubelet, dtype=weight.dtype, **pixels
        )
        rows = rows.view(-1, per_frame, rows.shape[-1])
        if folded:
            x, positions = kernels.frozen_linear(rows, self.patch_rows), self.patch_positions
        else:
            x = kernels.library_linear(rows, weight.flatten(1), self.conv1.bias)
            positions = self.positional_embedding
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat([first, x], 1) + positions)

    @torch.no_grad()
    def forward(
        self, video: Tensor, mask: MaskConfig, seed: Tensor, *, with_image: bool = False, with_targets: bool = True
    ) -> TeacherOutput:
        """Draws the mask and computes the targets at its visible tokens.

        Args:
            video: uint8 (B, T, H, W, 3), or ImageNet-normalized (B, 3, T, H, W); every tower is fed ImageNet statistics,
                CLIP too, as in the official code.
            mask: which tokens stay visible, and in how many views of each clip.
            seed: int64 (1,) on the video's device.
            with_image: give the image embedding too.
            with_targets: give the targets; without them only the mask is drawn.
        """
        batch = video.shape[0]
        x = self.embed(video)
        per_frame = x.shape[1] - 1
        frames = x.shape[0] // batch
        side = int(per_frame**0.5)
        last = self.blocks[-1]
        features = []
        for depth, block in enumerate(self.blocks[:-1]):
            x = block(x)
            if depth >= len(self.blocks) - self.num_layers:
                features.append(x)
        y = last.ln_1(x)
        k, v = last.attn.project(y, slice(1, 3))
        attention, kind = None, mask_named(mask.kind)
        if kind.needs_teacher:
            (q,) = last.attn.project(y[:, 0], slice(0, 1))
            attention = ClassAttention(q, k.transpose(1, 2))
        grid, seeds = TokenGrid(frames, side, side), [seed_of_view(seed, view) for view in range(mask.per_clip)]
        drawn = [kind.draw(batch, grid, mask.ratio, each, attention) for each in seeds]
        visible = drawn[0] if len(drawn) == 1 else torch.stack(drawn, 1).flatten(0, 1)
        targets = None
        if with_targets:
            targets = self.targets_at(visible, x, y, k, v, features, views=len(seeds), rectangular=kind.rectangular)
        return TeacherOutput(visible, targets, self._image(x, y, k, v, frames) if with_image else None)

    def _image(self, x: Tensor, y: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        """The last block finished for the class tokens, normed and projected."""
        last = self.blocks[-1]
        (q,) = last.attn.project(y[:, :1], slice(0, 1))
        found = self.projected(self.ln_post(last.finish(x[:, :1], q, k, v)))
        return F.normalize(found.float(), dim=-1).view(-1, frames, found.shape[-1]).mean(1)

    def targets_at(
        self,
        visible: Tensor,
        x: Tensor,
        y: Tensor,
        k: Tensor,
        v: Tensor,
        features: list[Tensor],
        *,
        views: int = 1,
        rectangular: bool,
    ) -> Tensor:
        """Targets (K, B * M, n, D) at visible (B * M, n), from the last block's input x, its norm y, its keys and values.

        rectangular: every frame has the same number of visible tokens. Otherwise frames differ, no batch of queries
        per frame is rectangular, and the last block is finished for all tokens; so it is where views see more than there are.
        """
        last = self.blocks[-1]
        batch, n = visible.shape[0] // views, visible.shape[1]
        frames, per_frame = x.shape[0] // batch, x.shape[1] - 1
        if rectangular and views == 1:
            kept = visible.view(x.shape[0], -1) % per_frame + 1
            (q,) = last.attn.project(kernels.token_gather(y, kept), slice(0, 1))
            rows = [self._normed(feature, kept) for feature in features]
            rows.append(self.ln_post(last.finish(kernels.token_gather(x, kept), q, k, v)))
        else:
            # Past one class token per frame, flat indices move on by the frame's number plus one.
            kept = (visible + visible // per_frame + 1).view(batch, -1)
            rows = [self._normed(feature.view(batch, frames * (per_frame + 1), -1), kept) for feature in features]
            if rectangular and views * n < frames * per_frame:
                # Frame by frame the tokens of all its views; from (B, T, M, m) back to the views' order on the way.
                by_frame = visible.view(batch, views, frames, -1).transpose(1, 2)
                flat = by_frame.flatten(2).flatten(0, 1) % per_frame + 1
                (q,) = last.attn.project(kernels.token_gather(y, flat), slice(0, 1))
                done = last.finish(kernels.token_gather(x, flat), q, k, v).view(batch, views * n, -1)
                order = torch.arange(views * n, dtype=torch.int32, device=x.device)
                order = order.view(frames, views, -1).transpose(0, 1).reshape(1, -1).expand(batch, -1)
                rows.append(self._normed(done, order))
            else:
                (q,) = last.attn.project(y, slice(0, 1))
                done = last.finish(x, q, k, v).view(batch, frames * (per_frame + 1), -1)
                rows.append(self._normed(done, kept))
        # Of matrices, a compiler lets the products write their rows of the result, and copies none.
        rows = [self.projected(row.flatten(0, 1)) for row in rows]
        return torch.cat(rows).view(len(rows), batch * views, n, -1)

    def projected(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        if self.proj is None:
            return x
        return kernels.library_product(x, self.proj.t()) if x.ndim == 2 else x @ self.proj

    def _normed(self, feature: Tensor, kept: Tensor) -> Tensor:
        """ln_post of the kept rows of intermediate features."""
        norm = self.ln_post
        return kernels.gather_norm(feature, kept, norm.weight, norm.bias, eps=norm.eps)

    @torch.no_grad()
    def features(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens: projected intermediate features (K, B, N, D), not normalized, and attention scores (R, L) fp32."""
        batch = video.shape[0]
        x = self.embed(video)
        features = []
        for depth, block in enumerate(self.blocks):
            if depth == len(self.blocks) - 1:
                q, k = block.attn.project(block.ln_1(x), slice(0, 2))
                scores = kernels.class_attention(q[:, 0], k.transpose(1, 2))
            x = block(x)
            if depth >= len(self.blocks) - self.num_layers:
                features.append(x[:, 1:].reshape(batch, -1, x.shape[-1]))
        return self.projected(self.ln_post(torch.stack(features))), scores
