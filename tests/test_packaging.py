"""What the two wheels hold, and that each works where there is no checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
KERNELS = tomllib.loads((REPOSITORY / "kernels" / "pyproject.toml").read_text())
pytestmark = pytest.mark.process


def test_every_package_is_listed() -> None:
    listed = {"umt_fast.recipes"}
    for name, prefix in (("umt_fast", ""), ("kernels", "umt_fast.bundled.")):
        modules = (REPOSITORY / name).rglob("*.py")
        listed |= {prefix + ".".join(path.parent.relative_to(REPOSITORY).parts) for path in modules}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == listed
    own = {name.removeprefix("umt_fast.bundled.") for name in listed if "kernels" in name}
    assert set(KERNELS["tool"]["setuptools"]["packages"]) == own


def test_both_distributions_agree() -> None:
    """On the version, the license, and the bounds of what both need."""
    import kernels
    import umt_fast

    assert umt_fast._KERNELS_VERSION == kernels.__version__ and PROJECT["project"]["version"] == umt_fast.__version__
    assert (REPOSITORY / "LICENSE").read_text() == (REPOSITORY / "kernels" / "LICENSE").read_text()
    assert set(KERNELS["project"]["dependencies"]) < set(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    assert KERNELS["project"]["optional-dependencies"].items() <= extras.items()


def test_every_dependency_has_a_lowest_version() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for entry in [*PROJECT["project"]["dependencies"], *sum(extras.values(), [])]:
        assert re.match(r"umt_fast\[", entry) or re.match(r"[\w.-]+>=\d", entry), entry


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels by the name of their distribution, built from a copy of the repository."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("kernels", "umt_fast", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    words = ["wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(out)]
    pip(sys.executable, *words, str(source), str(source / "kernels"))
    assert not (source / "kernels" / "build").exists()  # beside build.py it would be taken for a package
    return {path.name.split("-")[0]: path for path in out.glob("*.whl")}


def pip(python: Path | str, *words: str) -> str:
    command = [sys.executable, "-m", "pip", "--python", str(python), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The interpreter of a new environment that sees the packages of this one, but not umt_fast."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Folders named in a .pth file are searched; the .pth files in them, as that of an editable umt_fast, are not read.
    seen = [path for path in sys.path if path.endswith("-packages") and Path(path).is_dir()]
    (site / "outside.pth").write_text("\n".join(seen))
    return folder / "bin" / "python"


def run(python: Path, program: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(python), "-c", program], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout.strip()


def files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheels_share_no_file_and_are_typed(wheels: dict[str, Path]) -> None:
    """None is a distribution named kernels either: libraries that look for Hugging Face's must not find ours."""
    assert set(wheels) == {"umt_fast", "umt_kernels"}
    umt_fast, kernels = files(wheels["umt_fast"]), files(wheels["umt_kernels"])
    assert not umt_fast & kernels
    assert {
        "umt_fast/py.typed",
        "umt_fast/report.html.jinja",
        "umt_fast/bundled/kernels/py.typed",
    } < umt_fast and "kernels/py.typed" in kernels
    inside = {name.removeprefix("umt_fast/bundled/") for name in umt_fast if name.startswith("umt_fast/bundled/")}
    assert inside == {name for name in kernels if name.startswith("kernels/")}
    pages = {name.rpartition("/")[2] for name in umt_fast if name.startswith("umt_fast/recipes/")}
    assert pages == {path.name for path in (REPOSITORY / "recipes").glob("*.py")}


@pytest.mark.slow
def test_umt_kernels_alone_runs_every_example_of_its_page(wheels: dict[str, Path], fresh: Path, tmp_path: Path) -> None:
    """pip finds what it needs in this environment, bounds included; umt_fast must not be asked for."""
    pip(fresh, "install", "-q", "--no-index", str(wheels["umt_kernels"]))
    program = (
        "import sys; sys.modules['umt_fast'] = None\n"
        "import doctest, importlib.metadata as metadata, kernels\n"
        "about = metadata.metadata('umt-kernels')\n"
        "page = about.get_payload() or about['Description']\n"
        "test = doctest.DocTestParser().get_doctest(page, {}, 'README.md', None, 0)\n"
        "found = doctest.DocTestRunner().run(test)\n"
        "print(kernels.__file__, found.attempted, found.failed, about['License-Expression'])"
    )
    place, attempted, failed, license = run(fresh, program, tmp_path).split()
    assert Path(place).is_relative_to(fresh.parents[1]) and license == "MIT"
    assert int(attempted) > 15 and int(failed) == 0


@pytest.mark.slow
def test_umt_fast_finds_its_recipes_and_its_own_kernels(wheels: dict[str, Path], fresh: Path, tmp_path: Path) -> None:
    """In a folder that has a `kernels` folder of its own, with no module in it; and where umt-kernels comes and goes."""
    (tmp_path / "kernels").mkdir()
    pip(fresh, "install", "-q", "--no-index", "--no-deps", str(wheels["umt_fast"]))
    with pytest.raises(AssertionError, match="umt_fast: error: data.train is empty"):
        run(
            fresh,
            "import sys; from umt_fast.__main__ import main; sys.exit(main(['train', 'stage1_k710:l16']))",
            tmp_path,
        )
    place = (
        "import umt_fast, importlib.util as u, pathlib, importlib.metadata as m\n"
        "print(pathlib.Path(u.find_spec('kernels').origin).parents[1].name, len(list(m.distributions(name='kernels'))))"
    )
    assert run(fresh, place, tmp_path) == "bundled 0"
    pip(fresh, "install", "-q", "--no-index", "--no-deps", str(wheels["umt_kernels"]))
    assert run(fresh, place, tmp_path) == "bundled 0"
    both = "import kernels, umt_fast; print(kernels.token_gather.__module__, kernels.__file__)"
    assert "bundled" not in run(fresh, both, tmp_path)
    older = "import kernels; kernels.__version__ = '0.0.9'\ntry:\n    import umt_fast\nexcept ImportError as e:\n    print(e)"
    assert "install umt-kernels==" in run(fresh, older, tmp_path)
    pip(fresh, "uninstall", "-q", "-y", "umt-kernels")
    used = "import umt_fast, kernels; print(kernels.token_gather.__module__, kernels.__file__)"
    assert "bundled" in run(fresh, used, tmp_path)
