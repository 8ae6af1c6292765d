"""RandAugment for clips: every random number is drawn first, then all frames are changed alike.

RandAugment (arXiv 1909.13719) in the variant of the official fine-tuning, timm's `increasing` set: 15 operations that all grow
stronger with the level. A policy is written as timm writes it: `rand-m7-n4-mstd0.5-inc1` draws 4 operations with replacement,
applies each with probability one half, at a level drawn from a normal distribution of mean 7 and deviation 0.5, cut to [0, 10].
Frames are Pillow's pictures, of any size; what is uncovered becomes gray. Resampling is bicubic if no other is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from umt_fast.config import ConfigError
from umt_fast.config.augment import POLICY
from umt_fast.extras import packages_of

with packages_of("video"):
    from PIL import Image, ImageEnhance, ImageOps

MAX_LEVEL = 10.0
_GRAY = (128, 128, 128)

Picture = Image.Image


class Operation(NamedTuple):
    """apply: picture, argument, how pixels are resampled -> picture. argument: strength in [0, 1] -> what `apply` takes, or
    None for an operation without strength. signed: the strength is negated in half of the draws."""

    apply: Callable[[Picture, float, Image.Resampling], Picture]
    argument: Callable[[float], float] | None = None
    signed: bool = False


def _affine(picture: Picture, resample: Image.Resampling, *coefficients: float) -> Picture:
    """Output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, coefficients, resample=resample, fillcolor=_GRAY)


def _rotate(picture: Picture, degrees: float, resample: Image.Resampling) -> Picture:
    return picture.rotate(degrees, resample=resample, fillcolor=_GRAY)


def _brighten_dark(picture: Picture, amount: float, _: Image.Resampling) -> Picture:
    table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhanced(kind: Callable[[Picture], ImageEnhance._Enhance]) -> Operation:
    """1 leaves the picture alone; below is weaker, above is stronger."""
    return Operation(lambda picture, factor, _: kind(picture).enhance(factor), lambda s: 1.0 + s * 0.9, signed=True)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda picture, *_: ImageOps.autocontrast(picture)),
    "Equalize": Operation(lambda picture, *_: ImageOps.equalize(picture)),
    "Invert": Operation(lambda picture, *_: ImageOps.invert(picture)),
    "Rotate": Operation(_rotate, lambda s: s * 30.0, signed=True),
    "PosterizeIncreasing": Operation(lambda p, bits, _: ImageOps.posterize(p, int(bits)), lambda s: 4 - int(s * 4)),
    "SolarizeIncreasing": Operation(lambda p, above, _: ImageOps.solarize(p, int(above)), lambda s: 256 - int(s * 256)),
    "SolarizeAdd": Operation(_brighten_dark, lambda s: int(s * 110)),
    "ColorIncreasing": _enhanced(ImageEnhance.Color),
    "ContrastIncreasing": _enhanced(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhanced(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhanced(ImageEnhance.Sharpness),
    "ShearX": Operation(lambda p, slope, how: _affine(p, how, 1, slope, 0, 0, 1, 0), lambda s: s * 0.3, signed=True),
    "ShearY": Operation(lambda p, slope, how: _affine(p, how, 1, 0, 0, slope, 1, 0), lambda s: s * 0.3, signed=True),
    # Shares of the frame's own width and height.
    "TranslateXRel": Operation(
        lambda p, part, how: _affine(p, how, 1, 0, part * p.width, 0, 1, 0), lambda s: s * 0.45, signed=True
    ),
    "TranslateYRel": Operation(
        lambda p, part, how: _affine(p, how, 1, 0, 0, 0, 1, part * p.height), lambda s: s * 0.45, signed=True
    ),
}


def argument_of(name: str, level: float, negative: bool = False) -> float | None:
    """What an operation takes at a level in [0, 10]; None where it has no strength.

    Raises ValueError: `negative` for an operation whose strength has no sign.
    """
    operation = OPERATIONS[name]
    if negative and not operation.signed:
        raise ValueError(f"{name} has no sign; its argument cannot be negative")
    if operation.argument is None:
        return None
    strength = level / MAX_LEVEL
    return operation.argument(-strength if negative else strength)


def apply(
    name: str, picture: Picture, argument: float | None, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Picture:
    """One operation on an RGB picture."""
    return OPERATIONS[name].apply(picture, argument, resample)


@dataclass(frozen=True, slots=True)
class Policy:
    """How many operations are drawn, and how strong they are."""

    level: float = 7.0
    deviation: float = 0.5
    count: int = 4
    probability: float = 0.5
    """Share of the drawn operations that are applied."""

    @classmethod
    def parse(cls, text: str) -> Policy:
        """The policy of timm's notation.

        Raises ConfigError: another notation, a level above 10, or a policy without `-inc1`, whose operations are others.
        """
        found = POLICY.fullmatch(text)
        if found is None or not int(found["increasing"] or 0):
            raise ConfigError(
                f"the RandAugment policy is {text!r}; write it as rand-m7-n4-mstd0.5-inc1 (only the set of -inc1 is here)"
            )
        level = float(found["level"] or MAX_LEVEL)
        if level > MAX_LEVEL:
            raise ConfigError(f"the RandAugment policy {text!r} has the level {level:g}; the largest is {MAX_LEVEL:g}")
        return cls(level, float(found["deviation"] or 0), int(found["count"] or 2))

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float | None]]:
        """The operations to apply, in order, with their arguments: one draw for all frames of a clip."""
        drawn = []
        for name in rng.choice(list(OPERATIONS), self.count).tolist():
            if rng.random() >= self.probability:
                continue
            level = min(MAX_LEVEL, max(0.0, rng.normal(self.level, self.deviation)))
            negative = OPERATIONS[name].signed and rng.random() < 0.5
            drawn.append((name, argument_of(name, level, negative)))
        return drawn


def augment(
    frames: Sequence[Picture],
    drawn: Sequence[tuple[str, float | None]],
    interpolation: str = "bicubic",
) -> list[Picture]:
    """All frames, each changed by the drawn operations one after another. interpolation: bicubic or bilinear."""
    changed, resample = list(frames), Image.Resampling[interpolation.upper()]
    for name, argument in drawn:
        changed = [apply(name, frame, argument, resample) for frame in changed]
    return changed
