"""Retrieval against its plain form: all scores at once, one pair at a time, one process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertTokenizerFast

from tests.videos import write_video
from umt_fast.config import DataConfig, TextConfig, VitConfig
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.queries import Queries, read_queries
from umt_fast.engine.distributed import Ranks
from umt_fast.models.video_text import VideoText
from umt_fast.models.weights import WeightsError
from umt_fast.tasks.ranking import Place, both_ways, judge, place_of, recalls, search
from umt_fast.tasks.retrieval import Keeper, evaluate, rerank
from umt_fast.tasks.retrieve import listing

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmno"]
ONE = Ranks(0, 1, torch.device("cpu"))


def test_recalls_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.5, 0.6, 0.4]])
    place = place_of(scores, torch.eye(3, dtype=torch.bool))
    assert place.rank.tolist() == [0, 1, 2] and place.level.tolist() == [0, 0, 0]
    figures = recalls(place, "x")
    assert figures["x_r1"] == pytest.approx(1 / 3) and figures["x_r5"] == 1.0
    assert figures["x_median_rank"] == 2
    other = Place(torch.tensor([0, 7]), torch.tensor([0, 0]))
    assert both_ways(place, other, "x")["x_r_mean"] == pytest.approx((1 / 3 + 1 + 1 + 0.5 + 0.5 + 1) / 6)


def test_several_right_answers_count_by_the_best() -> None:
    scores, right = torch.tensor([[0.1, 0.9, 0.8]]), torch.tensor([[True, False, True]])
    assert place_of(scores, right).rank.tolist() == [1]


def test_constant_scores_are_chance_and_not_a_hit() -> None:
    figures = recalls(place_of(torch.zeros(100, 100), torch.eye(100, dtype=torch.bool)), "x")
    assert [figures[f"x_r{k}"] for k in (1, 5, 10)] == pytest.approx([0.01, 0.05, 0.1])
    assert figures["x_median_rank"] == 50.5
    pair = recalls(place_of(torch.zeros(2, 2), torch.eye(2, dtype=torch.bool)), "x")
    assert pair["x_r1"] == 0.5 and pair["x_r5"] == 1.0


def test_answers_that_are_no_candidates_are_level() -> None:
    """Of six items one is re-ranked, a wrong one: the right one is at each of the other five places as likely."""
    candidates, right = torch.tensor([[0]]), torch.tensor([[0, 3]])
    place = judge(candidates, torch.tensor([[9.0]]), right, 6).place
    assert [place.recall(k).item() for k in (1, 5, 10)] == pytest.approx([0.0, 0.8, 1.0])
    assert place.rank.tolist() == [3.0]


def dense(right: Tensor, queries: int, items: int) -> Tensor:
    table = torch.zeros(queries, items, dtype=torch.bool)
    table[right[:, 0], right[:, 1]] = True
    return table


def test_search_and_judge_equal_all_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many right answers a query, more items than queries, blocks that do not divide; candidates without a right answer."""
    monkeypatch.setattr("umt_fast.tasks.ranking._QUERIES", 3)
    monkeypatch.setattr("umt_fast.tasks.ranking._ITEMS", 4)
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.randn(n, 4, generator=generator) for n in (8, 11))
    right = torch.tensor(sorted({(q, int(i)) for q in range(8) for i in (q, (3 * q) % 11)}))
    scores, hits = queries @ items.t(), dense(right, 8, 11)
    found = search(queries, items, right, 4)
    assert torch.equal(found.rank, place_of(scores, hits).rank)
    assert torch.equal(found.items, scores.topk(4).indices)
    assert not torch.isin(found.items[0], right[right[:, 0] == 0, 1]).any() or len(found.rank.unique()) > 2
    again = torch.randn(8, 4, generator=generator)
    table = torch.full((8, 11), -100.0).scatter(1, found.items, again)
    judged = judge(found.items, again, right, 11)
    assert torch.equal(judged.rank, place_of(table, hits).rank) and (judged.rank > 4).any()
    assert torch.equal(judged.scores, table.topk(4).values) and torch.equal(judged.items, table.topk(4).indices)
    assert search(queries, items, right, 50).items.shape == (8, 11)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Five clips with captions of all layouts: more captions than clips, several right answers both ways."""
    rng = np.random.default_rng(0)
    for number in range(5):
        cells = (rng.integers(0, 256, (3, 3, 3), np.uint8) for _ in range(4))
        write_video(tmp_path / f"{number}.mp4", (np.kron(cell, np.ones((16, 16, 1), np.uint8)) for cell in cells))
    captions = [["a b c", "d"], ["e f"], ["g", "h i j k", "l"], ["m n"], ["o a"]]
    entries = [{"video": f"{number}.mp4", "caption": texts} for number, texts in enumerate(captions)]
    entries.append({"video": ["1.mp4", "3.mp4"], "caption": "n e a"})
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


def small_model() -> VideoText:
    torch.manual_seed(0)
    vit = VitConfig(width=32, depth=1, num_heads=2, image_size=32, num_frames=2, drop_path=0.0)
    text = TextConfig(width=32, depth=3, fusion_layer=1, num_heads=2, vocab_size=20, max_positions=8)
    model = VideoText(vit, text, num_layers=1, output_dim=8, embed_dim=8).eval()
    for module in model.modules():  # at their initial size outputs are too alike for a ranking to mean anything
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.4)
    return model


def judged(world: Path, ranks: Ranks = ONE, model: VideoText | None = None, **options: int) -> tuple:
    queries = read_queries(world / "list.json")
    tokens = Tokens(queries.captions, BertTokenizerFast.from_pretrained(str(world)), max_length=6)
    options = {"top_k": 3, "batch_size": 2, "pairs": 2} | options
    return queries, *evaluate(model or small_model(), queries, tokens, DataConfig(workers=0), ranks, **options)


@torch.no_grad()
def pair_by_pair(model: VideoText, world: Path, queries: Queries) -> tuple[Tensor, Tensor]:
    """Products of embeddings and matching logits (V, N), each clip and caption by itself."""
    from umt_fast.data.loaders.reader import ClipReader

    reader = ClipReader(queries.clips, DataConfig(), num_frames=2, image_size=32, seed=0, train=False)
    tokens = Tokens(queries.captions, BertTokenizerFast.from_pretrained(str(world)), max_length=6)
    dual, match = torch.empty(2, len(queries.clips), len(queries.captions))
    for row in range(len(queries.clips)):
        vision, _ = model.vision_encoder.embed(torch.from_numpy(reader.read(0, row).video))
        clip = model.project_vision(model.vision_encoder.pool(vision, 2))
        for column in range(len(queries.captions)):
            ids, mask = tokens[torch.tensor([column])]
            hidden = model.text_encoder.encode(ids, mask)
            dual[row, column] = clip[0] @ model.project_text(hidden)[0]
            fused = model.text_encoder.fuse(hidden[None], mask[None], model.text_encoder.clip_keys(vision))
            match[row, column] = model.match(fused[0])[0, 1]
    return dual, match


def test_figures_equal_those_of_every_pair_by_itself(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ordered = small_model(), {}

    def noted(*arguments: object, **options: object) -> dict:
        ordered.update(rerank(*arguments, **options))
        return ordered

    monkeypatch.setattr("umt_fast.tasks.retrieval.rerank", noted)
    queries, figures, v2t, t2v = judged(world, model=model)
    dual, match = pair_by_pair(model, world, queries)
    hits = dense(queries.right, *dual.shape)
    assert figures["clips"] == 5 and figures["captions"] == 9
    expected = both_ways(place_of(dual, hits), place_of(dual.t(), hits.t()), "dual")
    for name, scores in (("both", match + dual / model.temperature), ("match", match)):
        sides = []
        for axis in (1, 0):
            kept = torch.zeros_like(hits).scatter_(axis, dual.topk(3, dim=axis).indices, True)
            sides.append(scores.masked_fill(~kept, -100.0))
        expected |= both_ways(place_of(sides[0], hits), place_of(sides[1].t(), hits.t()), name)
        for found, side in zip(ordered[name], (sides[0], sides[1].t()), strict=True):
            torch.testing.assert_close(found.scores, side.topk(3).values, rtol=1e-4, atol=1e-4)
            assert torch.equal(found.items, side.topk(3).indices)
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert ordered["match"][0] is v2t and ordered["match"][1] is t2v


def test_more_candidates_than_there_are_means_all(world: Path) -> None:
    _, figures, v2t, t2v = judged(world, top_k=128)
    assert v2t.items.shape == (5, 9) and t2v.items.shape == (9, 5)
    _, plain, listed, _ = judged(world, top_k=0)
    assert not any(name.startswith(("match", "both")) for name in plain) and listed.items.shape == (5, 9)
    assert plain == {name: value for name, value in figures.items() if not name.startswith(("match", "both"))}


def test_tokens_beyond_the_memory_limit_go_to_a_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spill))
    _, figures, v2t, t2v = judged(world)
    _, again, *found = judged(world, memory=0)
    assert again == figures and torch.equal(found[0].scores, v2t.scores) and torch.equal(found[1].items, t2v.items)

    def mapped_from(tensor: torch.Tensor) -> str:
        """The line of this process's memory map that a tensor lies in."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return line
        raise AssertionError("not in the memory map")

    keeper = Keeper(48 << 20)
    within, beyond = keeper.empty(8 << 20).fill_(1), keeper.empty(16 << 20).fill_(2)
    assert ".tokens" in mapped_from(beyond) and ".tokens" not in mapped_from(within)
    assert beyond[-1] == 2 and within[-1] == 1
    assert not list(spill.iterdir())  # nothing is left behind, not even by a killed run
    with pytest.raises(DataError, match="raise --memory_gib"):
        keeper.empty(1 << 50)


def test_names_and_scores_of_what_was_found(world: Path) -> None:
    queries, _, v2t, t2v = judged(world)
    written = json.loads(json.dumps(listing(queries, v2t, t2v)))
    assert [len(written[side]) for side in ("v2t", "t2v")] == [5, 9]
    last = written["t2v"][-1]
    assert last["caption"] == "n e a" and [Path(name).name for name in last["right"]] == ["1.mp4", "3.mp4"]
    assert [Path(name).name for name, _ in last["found"]] == [f"{row}.mp4" for row in t2v.items[-1].tolist()]
    assert last["found"][0][1] == pytest.approx(t2v.scores[-1, 0].item(), abs=1e-4)
    assert written["v2t"][2]["right"] == ["g", "h i j k", "l"] and written["v2t"][2]["rank"] == v2t.rank[2] + 1


def test_unreadable_clips_and_diverged_weights_are_named(world: Path) -> None:
    model = small_model()
    model.itm_head.weight.data.fill_(float("nan"))
    with pytest.raises(WeightsError, match="matching head's scores are not finite"):
        judged(world, model=model)
    model.text_proj.weight.data.fill_(float("inf"))
    with pytest.raises(WeightsError, match="embeddings are not finite"):
        judged(world, model=model)
    (world / "3.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"3\.mp4"):
        judged(world)


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_find_what_one_finds(world: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/tasks']\n"
        "from pathlib import Path\n"
        "import torch, torch.distributed as dist\n"
        "from test_retrieval import judged\n"
        "from umt_fast.engine.distributed import Ranks\n"
        "dist.init_process_group('gloo')\n"
        "rank = dist.get_rank()\n"
        "_, figures, *found = judged(Path(sys.argv[2]), Ranks(rank, 2, torch.device('cpu')))\n"
        "torch.save([figures, *((each.items, each.scores, each.rank) for each in found)], f'{sys.argv[2]}/found{rank}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([*command, str(REPOSITORY), str(world)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    _, figures, *found = judged(world)
    for rank in range(2):
        theirs, *lists = torch.load(world / f"found{rank}.pt", weights_only=True)
        assert theirs == figures
        for one, other in zip(found, lists, strict=True):
            assert torch.equal(one.items, other[0]) and torch.equal(one.rank, other[2])
            torch.testing.assert_close(one.scores, other[1], rtol=1e-4, atol=1e-5)
