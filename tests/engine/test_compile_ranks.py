"""run.compile under DDP: two gloo ranks, Inductor on the CPU. No graph is cut, and losses and draws are the eager run's."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.assets import tiny
from tests.engine.test_sharding import TEACHER, VIT, Loader
from tests.ranks import run_ranks
from umt_fast.config import AlignConfig, OptimConfig, RunConfig, Stage1Config, TeacherConfig, VitConfig
from umt_fast.engine import compiling
from umt_fast.engine import trainer as trainer_module
from umt_fast.engine.compiling import compiled_graphs
from umt_fast.engine.distributed import distributed_run
from umt_fast.engine.trainer import Trainer
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.tasks.video_text import VideoTextPretraining

pytestmark = [pytest.mark.process, pytest.mark.compile, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]


class Wide(nn.Module):
    """An objective without pieces whose gradients fill several buckets of DDP (25 MB, the first 1 MB)."""

    def __init__(self) -> None:
        super().__init__()
        self.trainable = nn.Sequential(*(nn.Linear(1536, 1536) for _ in range(5)), nn.Linear(1536, 1))

    def forward(self, batch: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
        x = batch["video"].flatten(1)[:, :1536]
        return {"loss": self.trainable(x).square().mean()}

    def flops_per_clip(self) -> float:
        return 1e6


def stage1(run: RunConfig) -> nn.Module:
    vit = VitConfig(**(VIT | {"drop_path": 0.4, "depth": 4}))
    return UnmaskedAlignment(
        Stage1Config(run=run, student=vit, teacher=TeacherConfig(**TEACHER), align=AlignConfig(num_layers=1))
    )


def every_run(out: Path) -> None:
    """What each of the two ranks does; the first writes what it saw."""
    trainer_module.measure_matmul_rate = lambda *_: 1e12
    logging.getLogger("umt_fast").addHandler(logging.FileHandler(out / f"log{os.environ['RANK']}.txt"))
    logging.getLogger("umt_fast").setLevel(logging.INFO)
    found = {}
    with distributed_run(RunConfig(device="cpu")) as ranks:
        for name, build in (("stage1", stage1), ("wide", lambda run: Wide())):
            for compile in (False, True):
                run = RunConfig(
                    out=str(out / f"{name}_{compile}"),
                    batch_size=2,
                    epochs=1,
                    warmup_epochs=0,
                    device="cpu",
                    dtype="fp32",
                    log_every=1,
                    tensorboard=False,
                    max_steps=3,
                    compile=compile,
                )
                torch.manual_seed(0)
                trainer = Trainer(
                    run, OptimConfig(lr=1e-3, lr_batch=0), build(run), Loader(2, ranks.rank, ranks.world_size)
                )
                before = compiled_graphs()
                trainer.train()
                rows = [json.loads(line) for line in Path(run.out, "metrics.jsonl").read_text().splitlines()]
                found[f"{name}_{compile}"] = {
                    "graphs": compiled_graphs() - before,
                    "losses": [row["loss"] for row in rows],
                    "norms": [row["grad_norm"] for row in rows],
                }
    (out / f"found{ranks.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    out = tmp_path_factory.mktemp("compiled")
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.engine.test_compile_ranks import every_run\nevery_run(Path(sys.argv[1]))\n"
    )
    run_ranks(out / "ranks.py", program, out)
    return json.loads((out / "found0.json").read_text()), (out / "log0.txt").read_text()


def test_the_step_is_one_graph_for_each_piece(found: tuple[dict, str]) -> None:
    rows, log = found
    # Teacher, patches, heads, and four blocks as two graphs: the first drops nothing, the others each at another rate.
    assert rows["stage1_True"]["graphs"] == 5 and "run.compile: 5 graph(s)" in log
    assert rows["stage1_False"]["graphs"] == 0


def test_the_borders_of_buckets_cut_nothing(found: tuple[dict, str]) -> None:
    assert found[0]["wide_True"]["graphs"] == 1


@pytest.mark.parametrize("name", ["stage1", "wide"])
def test_losses_and_gradients_are_those_of_the_eager_run(name: str, found: tuple[dict, str]) -> None:
    """With drop path: what is dropped comes from the same generator, outside the graphs."""
    eager, compiled = (found[0][f"{name}_{compile}"] for compile in (False, True))
    assert len(eager["losses"]) == 3
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=1e-4)


def test_the_pieces_of_stage_2_are_whole_for_clips_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process and without Inductor: what is traced, and that turns of clips and images fit the recompile limit."""
    settings = tiny.captions()
    settings.student.drop_path, settings.student.depth = 0.3, 3
    settings.text.hidden_dropout = settings.text.attention_dropout = 0.0
    settings.text.depth, settings.text.fusion_layer = 4, 2
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        compiling, "_whole", lambda function: torch.compile(function, fullgraph=True, dynamic=False, backend=keep)
    )
    torch.compiler.reset()
    torch.manual_seed(0)
    objective = VideoTextPretraining(settings, mask_id=3, special=(0, 1, 2)).train()
    texts = {"ids": torch.randint(4, 16, (2, 6)), "mask": torch.ones(2, 6, dtype=torch.bool), "sample": torch.arange(2)}
    turns = [
        {"video": torch.randint(256, (2, frames, 32, 32, 3), dtype=torch.uint8)} | texts for frames in (4, 1, 4, 1)
    ]

    def losses() -> list[float]:
        found = []
        for number, batch in enumerate(turns):
            torch.manual_seed(number)
            loss = objective(batch, torch.tensor([number]))["loss"]
            loss.backward()
            found += [loss.item(), torch.nn.utils.get_total_norm([p.grad for p in objective.model.parameters()]).item()]
            objective.zero_grad()
        return found

    expected = losses()
    compiling.compile_pieces(objective.pieces())
    assert losses() == pytest.approx(expected, rel=1e-4)
    # Of clips and of images each: teacher, patches, heads, blocks that drop and that do not, a fusion layer below the last
    # and the last one's two calls. Text is equally long for both: text layers and the vocabulary head are compiled once.
    assert len(graphs) == 2 * (1 + 1 + 1 + 2 + 3) + 2
