"""Who may import whom, and our `kernels` beside the libraries that probe for another one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# What each part of umt_fast may import of umt_fast, besides itself.
ALLOWED = {
    "registry": set(),
    "masking": {"registry"},
    "config": {"masking"},
    "extras": {"config"},
    "files": set(),
    "workers": set(),
    "data": {"config", "extras", "files", "workers"},
    "models": {"config", "extras", "files", "masking", "registry"},
    "engine": {"config", "extras", "files", "interrupts"},
    "tasks": {"config", "extras", "files", "masking", "data", "models", "engine"},
    "reference": {"config", "masking"},
    "bench": {"config", "masking", "models", "engine", "tasks", "reference"},
    "probing": {"config", "files", "data", "models", "engine", "tasks", "pretrained"},
    "demo": {"config", "extras", "files", "data", "tasks", "pretrained"},
}
FILES = sorted((REPOSITORY / "umt_fast").rglob("*.py")) + sorted((REPOSITORY / "kernels").rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_import_directions(path: Path) -> None:
    names = imported(path)
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    roots = {name.split(".")[0] for name in names}
    if parts[0] == "kernels":
        assert "umt_fast" not in roots
    else:
        assert "triton" not in roots
        own = {name.split(".")[1] for name in names if name.startswith("umt_fast.")}
        if len(parts) > 1 and parts[1] in ALLOWED:
            assert own <= ALLOWED[parts[1]] | {parts[1]}, f"imports {own - ALLOWED[parts[1]] - {parts[1]}}"
    if parts != ("umt_fast", "data", "loaders", "dali"):
        assert "nvidia" not in roots
    if parts not in (("kernels", "attention"), ("kernels", "qkv_attention")):
        assert not roots & {"flash_attn", "xformers"}


def test_no_file_is_longer_than_450_lines() -> None:
    """Tests included: a reader who wants to know one thing opens one file."""
    parts = ("umt_fast", "kernels", "benchmarks", "recipes", "tests")
    listed = [path for part in parts for path in (REPOSITORY / part).rglob("*.py")]
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in listed}
    assert len(lengths) > 400 and not {name: lines for name, lines in lengths.items() if lines > 450}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_configurations_need_no_torch() -> None:
    program = "import sys, umt_fast.config, umt_fast.recipe; print(sorted({'torch', 'kernels'} & set(sys.modules)))"
    assert run(program).strip() == "[]"


@pytest.mark.process
def test_kernels_stand_alone() -> None:
    program = (
        "import sys; sys.modules['umt_fast'] = None\n"
        "import torch, kernels\n"
        "print(kernels.token_gather(torch.arange(6.).view(1, 3, 2), torch.tensor([[2]])).tolist())"
    )
    assert run(program).strip() == "[[[4.0, 5.0]]]"


@pytest.mark.process
@pytest.mark.slow
def test_transformers_and_open_clip_import_beside_kernels() -> None:
    program = (
        "import kernels, transformers, open_clip\n"
        "from transformers import BertConfig, BertModel\n"
        "BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))\n"
        "import umt_fast, sys; print(sys.modules['kernels'].token_gather.__module__)"
    )
    assert run(program).strip() == "kernels.token_gather"


@pytest.mark.process
def test_another_kernels_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n"
        "try:\n    import umt_fast\nexcept ImportError as error:\n    print(error)"
    )
    assert "shadows" in run(program)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also where an import stands within a function."""
    paths = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    asks = {name: {other for other in imported(path) if other in paths} - {name} for name, path in paths.items()}
    # A package that is named only on the way to one of its modules is not meant.
    for name, others in asks.items():
        asks[name] = {one for one in others if not any(other.startswith(f"{one}.") for other in others)}
    left = dict(asks)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    while starts := [
        name for name in left if not any(name in others for other, others in left.items() if other != name)
    ]:
        for name in starts:
            del left[name]
    assert not left, f"in or between cycles: {sorted(left)}"
