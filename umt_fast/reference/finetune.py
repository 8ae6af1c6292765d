"""The plain implementation of fine-tuning: what the official step computes, in straightforward PyTorch.

It is the baseline of `bench finetune` and a second opinion in the tests. The same parameters under the same names give the
same loss and gradients as the fast implementation. It embeds patches by a convolution, materializes every attention map, keeps
the pre-training's position table on the host and copies it for every clip in every step, because the official step does so.

Legend: B clips, T token frames, N tokens of a clip, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from umt_fast.config import OptimConfig, VitConfig
from umt_fast.reference.stage1 import Block, PatchEmbed, sinusoid_table


def position_table(config: VitConfig) -> Tensor:
    """(1, N, C) fp32: the sinusoids of 8 x 14 x 14 tokens (or of position_grid); rows and columns are resized for each frame by
    bicubic interpolation, then the frames for each place by linear interpolation."""
    made_for = config.position_grid or ((8, 16, 16) if config.patch_size == 14 else (8, 14, 14))
    frames, rows, columns = config.grid
    table = sinusoid_table(made_for[0] * made_for[1] * made_for[2], config.width)[0].unflatten(0, made_for)
    if (rows, columns) != tuple(made_for[1:]):
        table = F.interpolate(table.permute(0, 3, 1, 2), (rows, columns), mode="bicubic").permute(0, 2, 3, 1)
    if frames != made_for[0]:
        lines = F.interpolate(table.permute(1, 2, 3, 0).flatten(0, 1), frames, mode="linear")
        table = lines.unflatten(0, (rows, columns)).permute(3, 0, 1, 2)
    return table.reshape(1, -1, config.width)


class PlainClassifier(nn.Module):
    """Normalized fp32 video (B, 3, T, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: VitConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.fc_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, num_classes)
        table = position_table(config)
        if table.shape[1] == 1568:
            self.position = table  # stays on the host, as in the official code
        else:
            self.register_buffer("position", table, persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch_embed(video)
        x = x + self.position.expand(len(x), -1, -1).type_as(x).to(x.device).clone()
        for depth, block in enumerate(self.blocks):
            again = depth < self.config.checkpoint_blocks
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return self.head(self.fc_norm(x.mean(1)))


def mix_in_place(video: Tensor, share: float, box: tuple[int, int, int, int]) -> None:
    """Mixes clip i of (B, 3, T, H, W) with clip B - 1 - i.

    box: top, bottom, left, right, which is filled from the other clip; where it is empty, clips are added by their shares.
    """
    top, bottom, left, right = box
    if bottom > top and right > left:
        video[..., top:bottom, left:right] = video.flip(0)[..., top:bottom, left:right]
    elif share != 1:
        other = video.flip(0).mul_(1 - share)
        video.mul_(share).add_(other)


def mixed_targets(label: Tensor, num_classes: int, share: float, smoothing: float) -> Tensor:
    """(B, num_classes) fp32: smoothed one-hot rows of classes (B,), added by their shares."""
    rest = smoothing / num_classes
    own, other = (
        torch.full((len(label), num_classes), rest, device=label.device).scatter_(1, of[:, None], 1 - smoothing + rest)
        for of in (label, label.flip(0))
    )
    return own * share + other * (1 - share)


def soft_target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with probabilities, both (B, classes), the mean over clips."""
    return -(targets * F.log_softmax(logits, -1)).sum(-1).mean()


def layered_optimizer(model: PlainClassifier, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW as the official code sets it up: not fused, a group for the matrices and one for the vectors of every layer. Each
    group's `lr_scale` multiplies its rate."""
    depth, groups = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else None
        layer = 0 if name.startswith("patch_embed.") else depth + 1 if block is None else block + 1
        decayed = parameter.ndim > 1
        group = groups.setdefault((layer, decayed), {"params": []})
        group |= {
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr_scale": config.layer_decay ** (depth + 1 - layer),
        }
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=config.betas, eps=config.eps)
