"""Matrix-product FLOPs of the towers and texts, two for each multiplication; what `mfu` and `plan` divide by.

Every product that the objectives run is counted, backward passes with two products for each of a forward pass. Not counted:
CLIP's text tower, the similarities of a batch (their number depends on all ranks), and activations computed again.

Legend: n visible tokens of a clip, L tokens of a frame, C and W vision and text width, l text positions.
"""

from __future__ import annotations

from umt_fast.config import MaskConfig, TeacherConfig, TextConfig, VitConfig
from umt_fast.masking import TokenGrid, mask_named


def grid_of(vit: VitConfig) -> TokenGrid:
    """The token grid of the tower's clips."""
    return TokenGrid.of(
        num_frames=vit.num_frames, tubelet_size=vit.tubelet_size, image_size=vit.image_size, patch_size=vit.patch_size
    )


def visible_of(vit: VitConfig, mask: MaskConfig | None) -> int:
    """n: tokens of a clip that a mask leaves visible; None: all."""
    grid = grid_of(vit)
    return grid.size if mask is None else mask_named(mask.kind).count(grid, mask.ratio)


def tower_flops(vit: VitConfig, visible: int, *, num_layers: int, output_dim: int) -> float:
    """The student over a clip, forward and backward, with num_layers alignment heads (0: none) of output_dim channels."""
    width = vit.width
    span = visible if vit.attention == "joint" else visible // grid_of(vit).frames
    hidden = int(width * vit.mlp_ratio)
    block = visible * (8 * width * width + 4 * width * hidden + 4 * span * width)
    heads = num_layers * 2 * visible * width * output_dim
    patch = visible * width * 3 * vit.tubelet_size * vit.patch_size**2 * 2
    # The patch rows take no gradient: forward and weight gradient only.
    return 3 * (vit.depth * block + heads) + 2 * patch


def frame_tower_flops(
    clip: TeacherConfig,
    vit: VitConfig,
    mask: MaskConfig,
    *,
    num_layers: int,
    with_image: bool = False,
    projects: bool = True,
) -> float:
    """A frozen tower over the frames of a clip (teachers/frame_tower.py): targets of num_layers blocks (0: none) at the
    visible tokens of each of mask.per_clip views, and the draws' own. projects: outputs go through a projection to
    clip.output_dim."""
    grid, c, kind = grid_of(vit), clip.width, mask_named(mask.kind)
    out = clip.output_dim if projects else 0
    tokens = grid.per_frame + 1
    whole = 24 * tokens * c * c + 4 * tokens * tokens * c
    kept = mask.per_clip * visible_of(vit, mask) / grid.frames
    # Keys and values of all tokens; queries, attention, projection and MLP of the visible ones. Where frames differ in
    # their number, they are finished whole; so they are where views see more tokens than there are.
    last = 4 * tokens * c * c
    if num_layers:
        by_token = kind.rectangular and (mask.per_clip == 1 or kept < grid.per_frame)
        last = last + kept * (20 * c * c + 4 * tokens * c) if by_token else whole
    if kind.needs_teacher:
        last += 2 * c * c + mask.per_clip * 2 * tokens * c
    if with_image:
        last += 20 * c * c + 4 * tokens * c + 2 * c * out
    patch = grid.per_frame * c * 6 * vit.tubelet_size * clip.patch_size**2
    targets = num_layers * 2 * kept * c * out
    return grid.frames * ((clip.depth - 1) * whole + last + patch + targets)


def text_flops(
    text: TextConfig,
    *,
    length: int,
    visible: int,
    pooled: int,
    vision_width: int,
    embed_dim: int,
    asked: float,
    fuses: bool,
) -> float:
    """Plain and masked text of a clip, the projections, and the fusion of four texts with it where `fuses`; forward and
    backward. pooled: vectors of a clip that are projected; asked: its positions that get vocabulary logits."""
    w, layers = text.width, text.depth - text.fusion_layer
    layer = 24 * length * w * w + 4 * length * length * w
    total = 2 * text.fusion_layer * layer + 2 * embed_dim * (pooled * vision_width + w)
    if fuses:
        one = layer + 4 * length * w * w + 4 * length * visible * w
        # The last layer: one text whole, of three the class token, which asks all keys and values.
        class_token = 4 * length * w * w + 24 * w * w + 4 * length * w + 4 * visible * w
        keys = 4 * visible * vision_width * w
        total += (layers - 1) * 4 * one + one + 3 * class_token + layers * keys
        total += 3 * 2 * w * 2 + asked * 2 * (w * w + w * text.vocab_size)
    return 3 * total
