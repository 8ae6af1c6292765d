"""The token grid of a clip, and what a kind of mask is.

Legend: B clips, T token frames, L tokens per frame, N = T * L tokens per clip, n visible tokens per clip.
A flat index runs frame-major, then rows, then columns, as in the official implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from umt_fast.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

# Tokens among which kernels.semantic_mask and kernels.sample_visible draw at most.
MAX_TOKENS, MAX_SCORES = 1024, 4096


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """T x rows x columns tokens of one clip."""

    frames: int
    rows: int
    columns: int

    @classmethod
    def of(cls, *, num_frames: int, tubelet_size: int, image_size: int, patch_size: int) -> TokenGrid:
        """The grid of a square clip of num_frames frames of image_size pixels."""
        side = image_size // patch_size
        return cls(num_frames // tubelet_size, side, side)

    @property
    def per_frame(self) -> int:
        return self.rows * self.columns

    @property
    def size(self) -> int:
        return self.frames * self.per_frame


def num_visible(tokens: int, mask_ratio: float) -> int:
    """tokens - int(tokens * mask_ratio): the official rounding (196 tokens at 0.8 leave 40)."""
    return tokens - int(tokens * mask_ratio)


def flatten_frames(visible: Tensor, frames: int, per_frame: int) -> Tensor:
    """Per-frame indices (B*T, m) in [0, L) -> flat clip indices (B, T*m) int32, still ascending."""
    import torch  # whoever has a tensor has imported it; configurations need none

    rows = visible.view(-1, frames, visible.shape[-1])
    offset = torch.arange(frames, device=visible.device, dtype=torch.int32) * per_frame
    return (rows + offset[:, None]).flatten(1)


# 2^64 over the golden ratio: its multiples lie far apart.
_STRIDE = 0x9E3779B97F4A7C15


def seed_of_view(seed: Tensor, view: int) -> Tensor:
    """The seed int64 (1,) of a clip's mask by its index: that of index 0 is `seed` itself."""
    wrapped = (view * _STRIDE + 2**63) % 2**64 - 2**63
    return seed + wrapped if view else seed


class Limit(NamedTuple):
    """What one draw of a mask chooses from: `tokens` of `where` (`a frame`, `a clip`), of which it can take `most`."""

    tokens: int
    most: int
    where: str


class ClassAttention(NamedTuple):
    """Where the teacher's class token looks in its last block: the head dimension d of H heads, R = B * T frames.

    query: (R, H, d), the class token's. keys: (R, H, 1 + L, d), the class token's first. Both unscaled.
    """

    query: Tensor
    keys: Tensor


class MaskKind(Protocol):
    """One way to choose the visible tokens of clips. Stateless: what it depends on it is given."""

    name: str
    """In configurations and checkpoints; never changed."""
    rectangular: bool
    """Whether every frame keeps as many tokens. Spatial attention asks for it, and the teacher saves work by it."""
    same_positions: bool
    """Whether every frame of a clip keeps the same positions."""
    needs_teacher: bool
    """Whether `draw` reads the teacher's attention. Without a teacher nothing is then hidden."""

    def count(self, grid: TokenGrid, ratio: float) -> int:
        """n, the visible tokens of one clip at a mask ratio in [0, 1): at least 1, and grid.size at ratio 0."""

    def limit(self, grid: TokenGrid) -> Limit:
        """The tokens that one draw chooses from, and how many it can take."""

    def draw(
        self, batch: int, grid: TokenGrid, ratio: float, seed: Tensor, attention: ClassAttention | None = None
    ) -> Tensor:
        """Visible flat indices (B, n) int32, ascending in each clip, on the seed's device. The host must not wait for it.

        Args:
            seed: int64 (1,) on the device; the only source of chance.
            attention: the teacher's, where needs_teacher; else None.
        """


MASKS: Registry[MaskKind] = Registry("mask kind")


def register(kind: MaskKind) -> MaskKind:
    """Makes a kind known by its name, and returns it. Raises ValueError: another one has the name."""
    return MASKS.register(kind)


def mask_named(name: str) -> MaskKind:
    """The kind of a name. Raises ValueError: none has it; the message says the nearest."""
    return MASKS.named(name)
