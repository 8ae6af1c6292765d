"""Multiple choice against the official implementation: every `mc_*.safetensors` of parity_files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.downstream_cases import LIMIT, sizes_of, state_of
from tests.parity_files import parity_files, read_case, relative
from umt_fast.engine.distributed import Ranks
from umt_fast.models.downstream import RetrievalModel
from umt_fast.models.weights import fit
from umt_fast.tasks.multiple_choice import choose, score_options

CASES = parity_files("mc")
ONE = Ranks(0, 1, torch.device("cpu"))
REPOSITORY = Path(__file__).resolve().parents[2]
_Case = tuple[dict, dict[str, Tensor], RetrievalModel]


def load(path: Path) -> _Case:
    config, tensors = read_case(path)
    vit, text = sizes_of(config, tensors)
    model = RetrievalModel(vit, text, embed_dim=config["emb"]).eval()
    fit(model, state_of(tensors, model), str(path))
    return config, tensors, model


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> _Case:
    return load(request.param)


def batches(
    tensors: dict[str, Tensor], rank: int = 0, world_size: int = 1, size: int = 3
) -> Iterator[dict[str, Tensor]]:
    """The clips of a file that a rank has, every world_size-th, some at a time."""
    rows = torch.arange(rank, len(tensors["in.video"]), world_size)
    for part in rows.split(size) if len(rows) else ():
        yield {
            "video": tensors["in.video"][part],
            "ids": tensors["in.input_ids"][part],
            "mask": tensors["in.attention_mask"][part].bool(),
            "answer": tensors["in.answer"][part],
            "row": part,
        }


def test_a_case_is_found() -> None:
    assert CASES


def test_parity_of_scores_and_choices(case: _Case) -> None:
    config, theirs, model = case
    scored = score_options(model, theirs["in.video"], theirs["in.input_ids"], theirs["in.attention_mask"].bool())
    assert relative(scored.logits, theirs["out.match_logits"]) < LIMIT
    assert relative(scored.similarity, theirs["out.similarity"]) < LIMIT
    assert relative(scored.scores, theirs["out.scores"]) < LIMIT
    assert torch.equal(scored.choice, theirs["out.choice"])
    figures, rows, scores = choose(model, [*batches(theirs), None], ONE)
    assert relative(scores, theirs["out.scores"]) < LIMIT
    assert 100 * figures["accuracy"] == pytest.approx(config["accuracy"], abs=0.0051)
    assert figures["clips"] == len(theirs["in.video"]) and torch.equal(rows[:, 1], theirs["out.choice"])


def test_one_option_is_chosen_whatever_its_score(case: _Case) -> None:
    _, theirs, model = case
    scored = score_options(
        model, theirs["in.video"], theirs["in.input_ids"][:, :1], theirs["in.attention_mask"][:, :1].bool()
    )
    every = score_options(model, theirs["in.video"], theirs["in.input_ids"], theirs["in.attention_mask"].bool())
    assert not scored.choice.any()
    torch.testing.assert_close(scored.similarity, torch.ones_like(scored.similarity))
    torch.testing.assert_close(scored.logits, every.logits[:, :1], rtol=1e-4, atol=1e-5)


def test_bad_input_is_named(case: _Case) -> None:
    _, theirs, model = case
    mask = theirs["in.attention_mask"].bool()
    with pytest.raises(ValueError, match="clips, options, positions"):
        score_options(model, theirs["in.video"], theirs["in.input_ids"].flatten(0, 1), mask.flatten(0, 1))
    (batch,) = batches(theirs, size=9999)
    answer = torch.zeros_like(batch["answer"])
    answer[1] = 99
    with pytest.raises(ValueError, match="clip 1 has the answer 99"):
        choose(model, [batch | {"answer": answer}], ONE)
    with pytest.raises(ValueError, match="no rank has a clip"):
        choose(model, [], ONE)


@pytest.mark.process
@pytest.mark.slow
def test_parity_of_accuracy_over_ranks_one_of_them_without_clips(tmp_path: Path) -> None:
    """Three ranks: two share the clips and have one of them both, the third has none."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/tasks']\n"
        "from pathlib import Path\n"
        "import torch, torch.distributed as dist\n"
        "from test_multiple_choice_parity import batches, load\n"
        "from umt_fast.engine.distributed import Ranks\n"
        "from umt_fast.tasks.multiple_choice import choose\n"
        "dist.init_process_group('gloo')\n"
        "rank = dist.get_rank()\n"
        "config, tensors, model = load(Path(sys.argv[2]))\n"
        "own = [] if rank == 2 else list(batches(tensors, rank, 2)) + list(batches(tensors, 0, 9999))\n"
        "figures, rows, _ = choose(model, own, Ranks(rank, 3, torch.device('cpu')))\n"
        "right = tensors['out.choice'] == tensors['in.answer']\n"
        "assert figures == {'accuracy': right.double().mean().item(), 'clips': len(right)}\n"
        "assert torch.equal(rows[:, 1], tensors['out.choice'])\n"
        "sys.stdout.write(f'equal on {rank}\\n')  # one write: ranks share the pipe\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", str(script)]
    done = subprocess.run([*command, str(REPOSITORY), str(CASES[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()[2::3]) == ["0", "1", "2"]
