"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the kernels run under Triton's interpreter; it must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real videos and parity data: $UMT_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("UMT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared test data at {folder}; set UMT_SHARED to its folder")
    return folder


@pytest.fixture
def tiny_list(tmp_path: Path) -> Path:
    """A list of two small videos."""
    import av
    import numpy as np

    lines = []
    for number in range(2):
        path = tmp_path / f"video{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
            for frame in range(12):
                picture = np.full((40, 48, 3), 20 * frame + number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{path.name},{number}\n")
    table = tmp_path / "tiny.csv"
    table.write_text("".join(lines))
    return table
