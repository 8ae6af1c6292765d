"""What a wheel holds, and that it works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    modules = [path for name in ("kernels", "umt_fast") for path in (REPOSITORY / name).rglob("*.py")]
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in modules}
    assert set(listed) == found | {"umt_fast.recipes"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel built from a copy of the repository, as pip would unpack it."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("kernels", "umt_fast", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    program = f"from {setuptools.__name__} import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_a_wheel_finds_its_recipes_and_runs_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    """In a folder that has a `kernels` folder of its own, with no module in it."""
    (tmp_path / "kernels").mkdir()
    command = [sys.executable, "-m", "umt_fast", "train", "stage1_k710:l16"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "data.train is empty" in done.stderr, done.stderr[-2000:]
    assert {path.name for path in (installed / "umt_fast" / "recipes").iterdir()} == {
        path.name for path in (REPOSITORY / "recipes").glob("*.py")
    }


def test_a_wheel_is_no_distribution_named_kernels(installed: Path) -> None:
    """Libraries that look for Hugging Face's `kernels` ask for a distribution of that name and must not find ours."""
    assert [path.name.split("-")[0] for path in installed.glob("*.dist-info")] == ["umt_fast"]
    assert all((installed / "umt_fast" / name).is_file() for name in ("py.typed", "report.html.jinja"))
    program = (
        "import importlib.metadata as m, kernels\n"
        "print(kernels.__file__, [d.name for d in m.distributions(name='kernels')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=installed, capture_output=True, text=True, check=True
    ).stdout.split()
    assert done == [str(installed / "kernels" / "__init__.py"), "[]"]
