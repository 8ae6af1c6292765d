"""Matrix-product FLOPs of everything that is trained, two for each multiplication; what `mfu`, `plan` and `bench` divide by.

The only place with such formulas: objectives and teachers add up what stands here. Every product that the objectives run is
counted, backward passes with two products for each of a forward pass. Not counted: CLIP's text tower, the similarities of a
batch (their number depends on all ranks), and activations computed again.

Legend: n visible tokens of a clip, L tokens of a frame, C and W vision and text width, l text positions.
"""

from __future__ import annotations

from typing import Any

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


def block_flops(tokens: float, span: float, width: int, hidden: int) -> float:
    """A transformer block forward: each of `tokens` attends to `span` tokens; hidden: width of the MLP."""
    return tokens * (8 * width * width + 4 * width * hidden + 4 * span * width)


def tower_parts(vit: VitConfig, visible: int, *, num_layers: int = 0, output_dim: int = 0) -> dict[str, float]:
    """The student over a clip, forward alone: `patches`, `blocks` and num_layers alignment `heads` of output_dim channels."""
    span = visible if vit.attention == "joint" else visible // grid_of(vit).frames
    return {
        "patches": visible * vit.width * 3 * vit.tubelet_size * vit.patch_size**2 * 2,
        "blocks": vit.depth * block_flops(visible, span, vit.width, int(vit.width * vit.mlp_ratio)),
        "heads": num_layers * 2 * visible * vit.width * output_dim,
    }


def tower_flops(
    vit: VitConfig, visible: int, *, num_layers: int = 0, output_dim: int = 0, frozen: bool = False
) -> float:
    """The student over a clip, forward and backward; frozen: forward alone. See tower_parts."""
    parts = tower_parts(vit, visible, num_layers=num_layers, output_dim=output_dim)
    # The pixels take no gradient: patch rows are multiplied forward and for the weight gradient only.
    return sum(parts.values()) if frozen else 3 * (parts["blocks"] + parts["heads"]) + 2 * parts["patches"]


def frame_tower_parts(
    clip: TeacherConfig,
    vit: VitConfig,
    mask: MaskConfig,
    *,
    num_layers: int,
    with_image: bool = False,
    projects: bool = True,
) -> dict[str, float]:
    """A frozen tower over the frames of a clip (teachers/frame_tower.py): `patches`, `blocks` (all but the last), and the
    `last` one with the draws of the masks and the targets of num_layers blocks (0: none) at the visible tokens of each of
    mask.per_clip views.

    projects: outputs go through a projection to clip.output_dim.
    """
    grid, c, kind = grid_of(vit), clip.width, mask_named(mask.kind)
    out = clip.output_dim if projects else 0
    tokens = grid.per_frame + 1
    whole = block_flops(tokens, tokens, c, 4 * c)
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
    return {
        "patches": grid.frames * grid.per_frame * c * 6 * vit.tubelet_size * clip.patch_size**2,
        "blocks": grid.frames * (clip.depth - 1) * whole,
        "last": grid.frames * (last + num_layers * 2 * kept * c * out),
    }


def frame_tower_flops(
    clip: TeacherConfig,
    vit: VitConfig,
    mask: MaskConfig,
    *,
    num_layers: int,
    with_image: bool = False,
    projects: bool = True,
) -> float:
    """All of frame_tower_parts."""
    parts = frame_tower_parts(clip, vit, mask, num_layers=num_layers, with_image=with_image, projects=projects)
    return sum(parts.values())


def frames_flops(clip: TeacherConfig, frames: int, *, frozen: bool) -> float:
    """All blocks of a tower over whole frames, forward and, unless frozen, backward."""
    tokens = (clip.image_size // clip.patch_size) ** 2 + 1
    return (1 if frozen else 3) * frames * clip.depth * block_flops(tokens, tokens, clip.width, 4 * clip.width)


def _text_layer(length: int, width: int) -> float:
    return block_flops(length, length, width, 4 * width)


def _cross(length: int, keys: int, width: int) -> float:
    """`length` text positions that ask `keys` others: queries, scores, sums and the output projection."""
    return 4 * length * width * width + 4 * length * keys * width


def _keys(count: int, width_in: int, width: int) -> float:
    """Keys and values of `count` positions of width_in."""
    return 4 * count * width_in * width


def _class_token(length: int, keys: int, width: int) -> float:
    """A last fusion layer that computes the class token alone, which asks all text positions and all `keys`."""
    return 4 * length * width * width + 24 * width * width + 4 * length * width + 4 * keys * width


def text_parts(
    text: TextConfig,
    *,
    length: int,
    visible: int,
    pooled: int,
    vision_width: int,
    embed_dim: int,
    asked: float,
    fuses: bool,
) -> dict[str, float]:
    """Plain and masked text of a clip, forward alone: the `text` layers, the projections for the `similarity`, and where
    `fuses` the clip's `keys`, the `fusion` of four texts with it, and the `heads` of matching and of hidden words. pooled:
    vectors of a clip that are projected; asked: its positions that get vocabulary logits."""
    w, layers = text.width, text.depth - text.fusion_layer
    layer = _text_layer(length, w)
    parts = {
        "text": 2 * text.fusion_layer * layer,
        "similarity": 2 * embed_dim * (pooled * vision_width + w),
        "keys": 0.0,
        "fusion": 0.0,
        "heads": 0.0,
    }
    if fuses:
        one = layer + _cross(length, visible, w)
        # The last layer: one text whole, of three the class token.
        parts["fusion"] = (layers - 1) * 4 * one + one + 3 * _class_token(length, visible, w)
        parts["keys"] = layers * _keys(visible, vision_width, w)
        parts["heads"] = 3 * 2 * w * 2 + asked * 2 * (w * w + w * text.vocab_size)
    return parts


def text_flops(text: TextConfig, **shapes: Any) -> float:
    """All of text_parts, forward and backward."""
    return 3 * sum(text_parts(text, **shapes).values())


def retrieval_flops(vit: VitConfig, text: TextConfig, *, length: int, embed_dim: int, fuses: bool) -> float:
    """Fine-tuned retrieval of a clip and its text: the tower, the text layers, the projections of each frame and of the text,
    and the fusion of three pairs where `fuses`; forward and backward."""
    grid, w = grid_of(vit), text.width
    layer, layers = _text_layer(length, w), text.depth - text.fusion_layer
    own = text.fusion_layer * layer + 2 * embed_dim * (grid.frames * vit.width + w)
    if fuses:
        pair = (layers - 1) * (layer + _cross(length, grid.size, w)) + _class_token(length, grid.size, w) + 4 * w
        own += layers * _keys(grid.size, vit.width, w) + 3 * pair
    return tower_flops(vit, grid.size) + 3 * own


def question_flops(vit: VitConfig, text: TextConfig, *, length: int, answers: float, answer: int) -> float:
    """A clip, its question of `length` positions and so many answers of which `answer` positions each are computed: the tower,
    the question fused with the clip, the answers' decoder over the question, vocabulary logits; forward and backward."""
    n, w, layers = grid_of(vit).size, text.width, text.depth - text.fusion_layer
    own = text.depth * _text_layer(length, w) + layers * (_cross(length, n, w) + _keys(n, vit.width, w))
    own += layers * (answers * (_text_layer(answer, w) + _cross(answer, length, w)) + _keys(length, w, w))
    own += 2 * answers * answer * (w * w + w * text.vocab_size)
    return tower_flops(vit, n) + 3 * own
