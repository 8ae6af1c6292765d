"""What the parts of a training step cost at best, counted from shapes, and where they end: what both stages share.

FLOPs are those of matrix products (models/flops.py). Bytes are what these and the passes between them read and write when
every elementwise operation is fused into a neighbor.

Legend: B clips, T frames, L patches a frame, N = T * L, n visible tokens a view, C width, K aligned layers, D output width.
"""

from __future__ import annotations

from dataclasses import dataclass

from umt_fast.bench.trained import Border
from umt_fast.config import MaskConfig, Stage1Config, Stage2Config, VitConfig
from umt_fast.models.flops import frame_tower_parts, grid_of, tower_parts, visible_of
from umt_fast.models.teachers import Teacher

# Elements a token, in widths, that a transformer block reads and writes: norm 2, qkv 4, attention 4, projection and
# residual 3, norm 2, first linear 5, second linear and residual 6.
BLOCK_TRAFFIC = 26


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of matrix products and bytes moved, of a batch."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def bytes_of(config: Stage1Config | Stage2Config) -> int:
    """Of a number that a step computes with."""
    return 2 if config.run.dtype == "bf16" else 4


def teacher_costs(config: Stage1Config | Stage2Config, vit: VitConfig, mask: MaskConfig) -> dict[str, Cost]:
    """The frozen tower over a batch of clips of `vit`."""
    clip, layers, batch, size = config.teacher, config.align.num_layers, config.run.batch_size, bytes_of(config)
    grid, c = grid_of(vit), clip.width
    rows, patch = batch * grid.frames * (grid.per_frame + 1), 3 * vit.tubelet_size * clip.patch_size**2
    seen = batch * mask.per_clip * visible_of(vit, mask)
    weight = size if clip.precision == "native" else 1
    flops = {name: batch * value for name, value in frame_tower_parts(clip, vit, mask, num_layers=layers).items()}
    return {
        "teacher patches": Cost(flops["patches"], batch * grid.size * (patch * (1 + 2 * size) + size * c)),
        "teacher blocks": Cost(
            flops["blocks"], (clip.depth - 1) * (size * rows * BLOCK_TRAFFIC * c + weight * 12 * c * c)
        ),
        "last block, mask, targets": Cost(
            flops["last"],
            size * (6 * rows * c + seen * BLOCK_TRAFFIC * c + 12 * c * c + layers * seen * (2 * c + clip.output_dim)),
        ),
    }


def student_costs(config: Stage1Config | Stage2Config, vit: VitConfig, mask: MaskConfig) -> dict[str, Cost]:
    """The trained tower over the visible tokens of a batch of clips of `vit`, forward; the alignment `loss` of its heads."""
    layers, views, size = config.align.num_layers, config.run.batch_size * mask.per_clip, bytes_of(config)
    n, width, out = visible_of(vit, mask), vit.width, config.teacher.output_dim
    seen, patch = views * n, 3 * vit.tubelet_size * vit.patch_size**2
    flops = {name: views * value for name, value in tower_parts(vit, n, num_layers=layers, output_dim=out).items()}
    block = size * (seen * BLOCK_TRAFFIC * width + (4 + 2 * vit.mlp_ratio) * width**2)
    return {
        "patches": Cost(flops["patches"], seen * (patch * (1 + 2 * size) + 4 * width)),
        "blocks": Cost(flops["blocks"], vit.depth * block),
        "heads": Cost(flops["heads"], layers * seen * size * (3 * width + out)),
        "loss": Cost(0, 2 * layers * seen * out * size),
    }


def backward_cost(patches: Cost, others: list[Cost], loss: Cost) -> Cost:
    """Two products for each one of forward; the pixels take no gradient. The loss's gradient is read with its operands."""
    forward = sum(others, Cost(0, 0))
    return forward + forward + patches + Cost(0, 1.5 * loss.bytes)


def optimizer_cost(trained: int) -> Cost:
    """Gradient norm; then AdamW reads parameter, gradient and two moments and writes three of them."""
    return Cost(0, 4 * 8 * trained)


def teacher_borders(teacher: Teacher) -> list[Border]:
    """The ends of the parts that teacher_costs names."""
    blocks, found = teacher.blocks, []
    if len(blocks) > 1:
        found = [Border(blocks[0], "forward", True, "teacher patches")]
        found += [Border(blocks[-2], "forward", False, "teacher blocks")]
    return [*found, Border(teacher, "forward", False, "last block, mask, targets")]
