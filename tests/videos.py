"""Small video files for tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def write_video(path: Path, pictures: Iterable[np.ndarray], *, rate: int = 10, **options: str) -> None:
    """H.264 in yuv420p of uint8 RGB pictures (H, W, 3) of even sizes; options of the encoder, as crf="0"."""
    import av  # at the point of use: some tests run where it is not installed

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        for number, picture in enumerate(pictures):
            if not number:
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
