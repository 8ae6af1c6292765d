"""The plain implementation of stage 1: what the official step computes, in straightforward PyTorch.

It is the baseline of `bench stage1` and a second opinion in the tests: the same parameters under the same names give
the same loss and gradients as the fast implementation when both are given the same mask. It embeds all tokens and throws most
away, materializes every attention map, projects every teacher token, draws all L indices of a frame's multinomial,
builds the mask on the host, and reads the loss every step, because the official step does so.

Legend: B clips, T frames, L tokens per frame, N = T * L, n visible, C width, K aligned layers, D teacher output width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.config import OptimConfig, Stage1Config, Stage2Config, TeacherConfig, VitConfig
from umt_fast.masking import TokenGrid, num_visible


def sinusoid_table(positions: int, width: int) -> Tensor:
    """(1, positions, width) fp32: sine on even, cosine on odd channels, computed in float64."""
    channel = np.arange(width)
    angle = np.arange(positions)[:, None] / np.power(10000.0, 2 * (channel // 2) / width)
    table = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle))
    return torch.from_numpy(table.astype(np.float32))[None]


class DropPath(nn.Module):
    """Drops the residual branch of whole samples at the given rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.empty(x.shape[0], 1, 1, device=x.device, dtype=x.dtype).bernoulli_(keep)
        return x * kept / keep


class Attention(nn.Module):
    """Self-attention with its (B, heads, N, N) map in memory and the key bias always zero."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q * (width // self.num_heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-LN transformer block of the student."""

    def __init__(self, config: VitConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Dense patch embedding: (B, 3, T, H, W) -> (B, N, C)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        patch = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, patch, patch)

    def forward(self, video: Tensor) -> Tensor:
        return self.proj(video).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """The student's tower; returns the normed outputs of its last K blocks at visible tokens, (K, B, n, C)."""

    def __init__(self, config: VitConfig, num_layers: int, positions: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.first_layer = config.depth - num_layers
        self.position = sinusoid_table(positions, config.width)  # stays on the host, as in the official code

    def forward(self, video: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(video)
        x = x + self.position[:, : x.shape[1]].type_as(x).to(x.device)  # an image has the first frame's positions
        x = x[~mask].reshape(x.shape[0], -1, x.shape[-1])
        features = []
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth >= self.first_layer:
                features.append(x)
        return self.norm(torch.stack(features))


class Decoder(nn.Module):
    """One alignment head: Linear, LayerNorm, optional L2 normalization."""

    def __init__(self, width: int, output_dim: int, normalize: str, eps: float = 1e-6) -> None:
        super().__init__()
        self.head = nn.Linear(width, output_dim)
        self.norm = nn.LayerNorm(output_dim, eps=eps)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.head(x))
        return x / x.norm(dim=-1, keepdim=True) if self.normalize == "l2" else x


class PlainStudent(nn.Module):
    """(B, 3, T, H, W) and mask (B, N) bool (true: hidden) -> (K, B, n, D)."""

    def __init__(self, config: Stage1Config | Stage2Config, grid: TokenGrid) -> None:
        super().__init__()
        vit, layers = config.student, config.align.num_layers
        self.encoder = Encoder(vit, layers, grid.size)
        self.clip_decoder = nn.ModuleList(
            Decoder(vit.width, config.teacher.output_dim, config.align.normalize) for _ in range(layers)
        )
        self.position = sinusoid_table(grid.size, vit.width)

    def forward(self, video: Tensor, mask: Tensor) -> Tensor:
        features = self.encoder(video, mask)
        return self.decode(features, mask)

    def decode(self, features: Tensor, mask: Tensor) -> Tensor:
        """The alignment heads: normed features (K, B, n, C) -> (K, B, n, D)."""
        count, batch, _, width = features.shape
        table = self.position[:, : mask.shape[1]].repeat(batch, 1, 1).type_as(features).to(features.device)
        position = table[~mask].view(batch, -1, width).unsqueeze(0).repeat(count, 1, 1, 1)
        features = features + position
        return torch.stack([decoder(each) for decoder, each in zip(self.clip_decoder, features, strict=True)])


class LayerNorm32(nn.LayerNorm):
    """LayerNorm computed in fp32 and cast back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class TeacherMlp(nn.Module):
    """Linear, QuickGELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class TeacherBlock(nn.Module):
    """A CLIP block on (L + 1, B*T, C); returns the attention map averaged over heads, (B*T, L + 1, L + 1), when asked.

    Tokens come first, as nn.MultiheadAttention takes them by default. Told batch_first, it computes by itself, which does
    not heed a CPU's autocast: the whole tower would compute in fp32.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm32(width)
        self.attn = nn.MultiheadAttention(width, num_heads)
        self.ln_2 = LayerNorm32(width)
        self.mlp = TeacherMlp(width)

    def forward(self, x: Tensor, with_weights: bool) -> tuple[Tensor, Tensor | None]:
        y = self.ln_1(x)
        y, weights = self.attn(y, y, y, need_weights=with_weights)
        x = x + y
        return x + self.mlp(self.ln_2(x)), weights


class PlainTeacher(nn.Module):
    """All frames, all tokens: (B, 3, T, H, W) -> features (K, B, N, D) and attention (B*T, L)."""

    def __init__(self, config: TeacherConfig, num_layers: int, normalize: str) -> None:
        super().__init__()
        self.image_size, self.num_layers, self.normalize = config.image_size, num_layers, normalize
        patch = (1, config.patch_size, config.patch_size)
        self.conv1 = nn.Conv3d(3, config.width, patch, patch, bias=False)
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.positional_embedding = nn.Parameter(torch.zeros(positions, config.width))
        self.ln_pre = LayerNorm32(config.width)
        blocks = nn.ModuleList(TeacherBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = LayerNorm32(config.width)
        self.proj = nn.Parameter(torch.zeros(config.width, config.output_dim))

    @torch.no_grad()
    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, frames, height, _ = video.shape
        if height != self.image_size:
            size = (self.image_size, self.image_size)
            video = F.interpolate(video.transpose(1, 2).flatten(0, 1), size, mode="bicubic", align_corners=False)
            video = video.unflatten(0, (batch, frames)).transpose(1, 2)
        x = self.conv1(video)
        x = x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding.to(x.dtype))
        x = x.transpose(0, 1)
        blocks = self.transformer["resblocks"]
        features = []
        for depth, block in enumerate(blocks):
            x, weights = block(x, depth == len(blocks) - 1)
            if depth >= len(blocks) - self.num_layers:
                features.append(x)
        normed = self.ln_post(torch.stack(features)[:, 1:])  # (K, L, B*T, C)
        projected = normed.unflatten(2, (batch, frames)).permute(0, 2, 3, 1, 4).flatten(2, 3) @ self.proj
        if self.normalize == "l2":
            projected = projected / projected.norm(dim=-1, keepdim=True)
        return projected, weights[:, 0, 1:]


def official_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW as the official code sets it up: not fused, no decay for one-dimensional parameters."""
    groups = [
        {"params": [p for p in parameters if p.ndim != 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=config.betas)


def fill_at_random(teacher: PlainTeacher) -> None:
    """Weights for timing: zeros would make every attention map uniform."""
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def draw_mask(attention: Tensor, batch: int, ratio: float) -> Tensor:
    """Semantic mask (B, N) bool, true: hidden, built on the host from attention (B*T, L)."""
    rows, per_frame = attention.shape
    kept = num_visible(per_frame, ratio)
    order = torch.multinomial(attention.float(), per_frame)
    mask = torch.ones(rows, per_frame)
    mask[torch.arange(rows)[:, None], order[:, :kept].cpu()] = 0
    return mask.view(batch, -1).to(torch.bool)


def targets_at(features: Tensor, mask: Tensor) -> Tensor:
    """Teacher features (K, B, N, D) at the tokens `mask` (B, N) leaves visible: (K, B, n, D)."""
    layers, batch, _, width = features.shape
    every = (~mask).unsqueeze(0).repeat(layers, 1, 1)
    return features[every].reshape(layers, batch, -1, width)


class PlainStage1(nn.Module):
    """The official training step without its optimizer: teacher, mask, student, loss."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        self.config = config
        vit = config.student
        self.grid = TokenGrid.of(
            num_frames=vit.num_frames,
            tubelet_size=vit.tubelet_size,
            image_size=vit.image_size,
            patch_size=vit.patch_size,
        )
        self.student = PlainStudent(config, self.grid)
        self.teacher = PlainTeacher(config.teacher, config.align.num_layers, config.align.normalize)
        self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PlainStage1:
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, video: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Aligns the student, at the tokens `mask` (B, N) leaves visible, with teacher features (K, B, N, D)."""
        targets, outputs = targets_at(features, mask), self.student(video, mask)
        if self.config.align.loss == "l2":
            return (2 - 2 * (outputs * targets).sum(-1)).mean()
        return (F.mse_loss if self.config.align.loss == "mse" else F.smooth_l1_loss)(outputs, targets)

    def forward(self, video: Tensor) -> Tensor:
        """Normalized fp32 video (B, 3, T, H, W) -> scalar loss."""
        features, attention = self.teacher(video)
        mask = draw_mask(attention, video.shape[0], self.config.mask.ratio).to(video.device, non_blocking=True)
        return self.loss(video, features, mask)
