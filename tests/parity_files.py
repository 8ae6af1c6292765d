"""Parity cases: files written by running the official implementation, committed ones and the shared folder's."""

from __future__ import annotations

import os
from pathlib import Path

COMMITTED = Path(__file__).resolve().parent / "parity"


def parity_files(kind: str) -> list[Path]:
    """The files KIND_*.safetensors: first those in tests/parity, then those in $UMT_SHARED/parity where it is set."""
    folders = [COMMITTED]
    if os.environ.get("UMT_SHARED"):
        folders.append(Path(os.environ["UMT_SHARED"]) / "parity")
    return [path for folder in folders for path in sorted(folder.glob(f"{kind}_*.safetensors"))]
