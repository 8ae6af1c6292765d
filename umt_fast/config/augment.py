"""How clips are changed for fine-tuning: the published augmentation, and mixing of the clips of a batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from umt_fast.config.core import check_numbers, require

FrameRuleName = Literal["kinetics", "ssv2", "dense"]
# As timm writes it: rand, then the level, how many operations, the level's deviation, and the set of operations.
POLICY = re.compile(
    r"rand(?:-m(?P<level>\d+)|-n(?P<count>\d+)|-mstd(?P<deviation>\d+(?:\.\d*)?)|-inc(?P<increasing>\d))*"
)


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Frames and pixels of the published fine-tuning; read with protocol `published` alone."""

    protocol: Literal["data", "published"] = "data"
    """`data`: frames and crops as data.sampling and data.augment say. `published`: those of the published fine-tuning, in this
    order, the same for all frames of a clip: RandAugment of whole frames, random-resized crop, flip (data.flip), erasing."""
    frames: FrameRuleName = "kinetics"
    """Which frames: `kinetics` (Moments in Time too), `ssv2` (Something-Something V2), `dense`: frames `sampling_rate` apart
    (UCF101, HMDB51). The view that validation judges is taken by the same rule."""
    sampling_rate: int = 4
    """Frame stride of `dense`."""
    rand_augment: str = "rand-m7-n4-mstd0.5-inc1"
    """RandAugment's policy in timm's notation; empty: none."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How RandAugment resamples frames that it turns, shears or moves."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the frame that a crop covers."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333)
    """Least and largest width over height of a crop."""
    erasing: float = 0.25
    """Share of the clips in which boxes are erased."""
    erasing_mode: Literal["pixel", "color", "black"] = "pixel"
    """What fills a box: `pixel`: a normal draw for every value; `color`: one for each frame and channel; `black`: zeros, which
    normalized are the mean color. timm calls them pixel, rand and const."""
    erasing_count: int = 1
    """Boxes of such a clip; each covers so much less."""

    def __post_init__(self) -> None:
        check_numbers(self, "augment")
        for name in ("sampling_rate", "erasing_count"):
            require(getattr(self, name) >= 1, f"augment.{name} is {getattr(self, name)}; it must be at least 1")
        require(0 <= self.erasing <= 1, f"augment.erasing is {self.erasing}; it must lie in [0, 1]")
        low, high = self.crop_area
        require(0 < low <= high <= 1, f"augment.crop_area is {self.crop_area}; give two shares, least first, in (0, 1]")
        low, high = self.crop_aspect
        require(0 < low <= high, f"augment.crop_aspect is {self.crop_aspect}; give two positive numbers, least first")
        found = POLICY.fullmatch(self.rand_augment) if self.rand_augment else None
        require(
            not self.rand_augment or (found is not None and int(found["increasing"] or 0) > 0),
            f"augment.rand_augment is {self.rand_augment!r}; write it as rand-m7-n4-mstd0.5-inc1 (only the set of -inc1 is "
            "here), or leave it empty",
        )

    @property
    def published(self) -> bool:
        return self.protocol == "published"


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """How clips of a batch are mixed, by Mixup and CutMix; the defaults are those of the official fine-tuning."""

    mixup_alpha: float = 0.8
    """Both parameters of the Beta distribution of Mixup's share; 0 switches Mixup off."""
    cutmix_alpha: float = 1.0
    """The same for CutMix."""
    cutmix_minmax: tuple[float, ...] = ()
    """Least and largest side of CutMix's box as a share of the picture's, in place of cutmix_alpha; empty: not used."""
    probability: float = 1.0
    """Share of the batches (or clips) that are mixed."""
    switch: float = 0.5
    """Share of CutMix where both are on."""
    per: Literal["batch", "clip"] = "batch"
    """One draw for a batch, or one for each clip."""

    def __post_init__(self) -> None:
        check_numbers(self, "mix")
        for name in ("mixup_alpha", "cutmix_alpha"):
            require(getattr(self, name) >= 0, f"mix.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("probability", "switch"):
            require(0 <= getattr(self, name) <= 1, f"mix.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        limits = self.cutmix_minmax
        require(
            not limits or (len(limits) == 2 and 0 <= limits[0] < limits[1] <= 1),
            f"mix.cutmix_minmax is {limits}; give two shares, least < largest, in [0, 1], or none",
        )

    @property
    def on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0 or bool(self.cutmix_minmax))


def no_mix() -> MixConfig:
    """Clips stay as they are."""
    return MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0)
