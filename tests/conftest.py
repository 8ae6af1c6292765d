"""Fixtures every test may use."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from tests.parity_files import COMMITTED
from tests.videos import write_video

# Without a GPU the kernels run under Triton's interpreter; it must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted kernels take long for the shared folder's parity files; those committed here are small."""
    for item in items if not torch.cuda.is_available() else ():
        values = list(getattr(getattr(item, "callspec", None), "params", {}).values())
        files = [value for value in values if isinstance(value, Path) and value.suffix == ".safetensors"]
        interpreted = any(isinstance(value, str) and value == "triton" for value in values)
        if interpreted and any(COMMITTED not in path.parents for path in files):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real videos and parity data: $UMT_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("UMT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared test data at {folder}; set UMT_SHARED to its folder")
    return folder


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make) is a folder that make(folder) filled, once for all processes of a test run. Nobody may change it."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, partial = root / f"once-{name}", root / f"once-{name}.partial"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial.mkdir()
                make(partial)
                partial.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_videos(once: Once) -> Path:
    """A folder with tiny.csv, a list of two small videos: video0.mp4 of class 0 and video1.mp4 of class 1."""

    def make(folder: Path) -> None:
        for number in range(2):
            shades = (np.full((40, 48, 3), 20 * frame + number, np.uint8) for frame in range(12))
            write_video(folder / f"video{number}.mp4", shades)
        (folder / "tiny.csv").write_text("video0.mp4,0\nvideo1.mp4,1\n")

    return once("videos", make)


@pytest.fixture
def tiny_list(tmp_path: Path, tiny_videos: Path) -> Path:
    """The list of tiny_videos in a folder of the test's own, where it may add and change files."""
    for path in tiny_videos.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / "tiny.csv"
