"""kernels without the rest: its README's examples, and a process where nothing else of this project can be imported."""

import doctest
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_examples_of_the_readme_run() -> None:
    found = doctest.testfile(str(REPOSITORY / "kernels" / "README.md"), module_relative=False)
    assert found.attempted > 15 and not found.failed


def test_the_readme_lists_every_kernel_that_is_built() -> None:
    from kernels.build import cases

    text = (REPOSITORY / "kernels" / "README.md").read_text()
    for case in cases():
        assert f"| {case.name} | {case.bytes_moved / 1e6:.1f} |" in text, "run `python -m kernels.build --table`"


def test_works_where_umt_fast_cannot_be_imported_and_beside_transformers() -> None:
    script = (
        "import sys; sys.modules['umt_fast'] = None\n"
        "import torch, kernels, transformers, open_clip\n"
        "x = torch.randn(1, 4, 8, requires_grad=True)\n"
        "kernels.token_gather(x, torch.tensor([[0, 2]])).sum().backward()\n"
        "print(int(x.grad.sum()), not any(name.startswith('umt_fast.') for name in sys.modules))\n"
        "transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["16", "True"]
