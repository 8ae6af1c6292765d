"""Retrieval of next to nothing: one candidate, ranks without clips, texts without a word."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tasks.galleries import Captions, Gallery
from umt_fast.config import DataConfig, TextConfig, VitConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.sources.lists import Clip
from umt_fast.engine.distributed import Ranks
from umt_fast.models.downstream import RetrievalModel
from umt_fast.tasks import ranking, retrieval
from umt_fast.tasks.retrieval_tuning import retrieval_losses

REPOSITORY = Path(__file__).resolve().parents[2]


def words(count: int) -> Captions:
    """Texts of which the first is its class token alone."""
    ids = torch.randint(5, 20, (count, 4), generator=torch.Generator().manual_seed(1))
    return Captions(ids, torch.arange(4) < torch.tensor([1, *[4] * (count - 1)])[:, None])


def model_of() -> RetrievalModel:
    torch.manual_seed(0)
    vit = VitConfig(width=16, depth=1, num_heads=2, patch_size=8, image_size=16, num_frames=2, drop_path=0.0)
    text = TextConfig(
        width=16,
        depth=3,
        fusion_layer=1,
        num_heads=2,
        vocab_size=20,
        max_positions=4,
        init_std=0.3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return RetrievalModel(vit, text, embed_dim=6).eval()


def found(count: int, captions: int, ranks: Ranks, **options: int) -> tuple[dict[str, float], Any, Any]:
    """What evaluate says of random clips, each with a caption of its number (more captions belong to the last)."""
    video = torch.randn(count, 3, 2, 16, 16, generator=torch.Generator().manual_seed(2))

    def loader(clips: range, data: DataConfig, *, rank: int, world_size: int, **_: Any) -> Iterator[dict[str, Tensor]]:
        own = video[rank::world_size]
        return ({"video": part} for part in own.split(2)) if len(own) else iter(())

    right = torch.tensor(sorted((min(row, count - 1), row) for row in range(captions)))
    queries = Gallery(range(count), range(captions), right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "ClipLoader", loader)
        return retrieval.evaluate(model_of(), queries, words(captions), DataConfig(), ranks, **options)


def test_one_candidate_is_always_found() -> None:
    figures, v2t, t2v = found(1, 1, Ranks(0, 1, torch.device("cpu")))
    assert v2t.items.tolist() == [[0]] and t2v.items.tolist() == [[0]]
    assert figures["match_r_mean"] == figures["dual_r_mean"] == 1.0
    assert set(ranking.official_recalls(v2t.place, t2v.place).values()) == {100.0}


def test_a_rank_beyond_the_last_clip_reads_none(tmp_path: Path) -> None:
    unreadable = tmp_path / "empty.mp4"
    unreadable.touch()
    clips = [Clip(path=str(unreadable))]
    loader = ClipLoader(
        clips, DataConfig(workers=0), num_frames=2, image_size=16, batch_size=2, rank=1, world_size=3, train=False
    )
    assert list(loader) == []


@pytest.mark.process
@pytest.mark.slow
def test_ranks_without_clips_say_the_same(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/tasks']\n"
        "import torch, torch.distributed as dist\n"
        "from test_retrieval_edges import found\n"
        "from umt_fast.engine.distributed import Ranks\n"
        "dist.init_process_group('gloo')\n"
        "figures, v2t, t2v = found(2, 4, Ranks(dist.get_rank(), 3, torch.device('cpu')), top_k=2)\n"
        "torch.save([figures, v2t.items, v2t.scores, t2v.items, t2v.scores], f'{sys.argv[2]}/{dist.get_rank()}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", str(script)]
    done = subprocess.run([*command, str(REPOSITORY), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures, v2t, t2v = found(2, 4, Ranks(0, 1, torch.device("cpu")), top_k=2)
    for rank in range(3):
        theirs, *lists = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert theirs == figures
        for one, other in zip((v2t.items, v2t.scores, t2v.items, t2v.scores), lists, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_sample_still_has_a_loss() -> None:
    """All rows right answers of each other: no negative is a wrong one, and the loss is finite."""
    video = torch.randn(3, 3, 2, 16, 16, generator=torch.Generator().manual_seed(2))
    ids, mask = words(3)[torch.arange(3)]
    model = model_of()
    losses = retrieval_losses(
        model, video=video, ids=ids, mask=mask, index=torch.tensor([4, 4, 4]), seed=torch.tensor([1])
    )
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())
