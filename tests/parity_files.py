"""Parity cases: files written by running the official implementation, committed ones and the shared folder's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from umt_fast.config import VitConfig

COMMITTED = Path(__file__).resolve().parent / "parity"


def parity_files(kind: str) -> list[Path]:
    """The files KIND_*.safetensors: first those in tests/parity, then those in $UMT_SHARED/parity where it is set."""
    folders = [COMMITTED]
    if os.environ.get("UMT_SHARED"):
        folders.append(Path(os.environ["UMT_SHARED"]) / "parity")
    return [path for folder in folders for path in sorted(folder.glob(f"{kind}_*.safetensors"))]


def cases_or_skip(kind: str) -> list:
    """The files of a kind as parameters of a test, named by their stems; where there is none, one that is skipped."""
    absent = pytest.param(
        None, marks=pytest.mark.skip(reason=f"no {kind}_* file; set UMT_SHARED to the folder that has them")
    )
    return [pytest.param(path, id=path.stem) for path in parity_files(kind)] or [absent]


def read_case(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}


def tower_of(config: dict) -> VitConfig:
    """The sizes of a file's vision tower; nothing is dropped."""
    return VitConfig(
        width=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        patch_size=config["patch"],
        tubelet_size=config.get("tubelet", 1),
        image_size=config["img"],
        num_frames=config["t"],
        drop_path=0.0,
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The distance of two equally shaped tensors, as a share of the second's norm."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()
