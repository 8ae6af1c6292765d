"""Two processes with half the batch each: the losses and gradients of one process with all of it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.parity_files import parity_files
from tests.ranks import run_ranks
from tests.small_models import small_text
from umt_fast.config import Stage2Losses, VitConfig
from umt_fast.models.video_text import VideoText
from umt_fast.tasks import video_text_losses as vision_text
from umt_fast.tasks.video_text_losses import stage2_losses

REPOSITORY = Path(__file__).resolve().parents[2]


def small_model() -> VideoText:
    torch.manual_seed(3)
    vit = VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=2, drop_path=0.0)
    text = small_text()
    return VideoText(vit, text, num_layers=2, output_dim=16, embed_dim=12)


def joint_batch() -> dict[str, Tensor]:
    """Four pairs; the first and the last show one sample. Negatives stay within each half, as ranks draw them."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 50, (4, 6), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, [2, 4]] = ids[:, [2, 4]]  # as many in each half: the mean over positions is then the mean of means
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 5] = mask[2, 5] = False
    return {
        "video": torch.randn(4, 3, 2, 32, 32, generator=generator),
        "visible": torch.tensor([[0, 3, 4], [1, 2, 7], [0, 1, 5], [2, 5, 6]], dtype=torch.int32),
        "ids": ids,
        "mask": mask,
        "index": torch.tensor([7, 1, 2, 7]),
        "masked_ids": torch.where(labels == -100, ids, 4),
        "labels": labels,
        "targets": torch.randn(2, 4, 3, 16, generator=generator),
        "clip_of": torch.tensor([1, 0, 3, 2]),
        "text_of": torch.tensor([1, 0, 3, 2]),
    }


def part_of(batch: dict[str, Tensor], rank: int, ranks: int) -> dict[str, object]:
    """A rank's rows; negatives count from its first row."""
    size = 4 // ranks
    rows = slice(rank * size, (rank + 1) * size)
    part = {key: value[:, rows] if key == "targets" else value[rows] for key, value in batch.items()}
    negatives = (part.pop("clip_of") - rank * size, part.pop("text_of") - rank * size)
    return part | {"negatives": negatives, "seed": torch.tensor([0]), "rank": rank}


def gradients_of(
    rank: int = 0, ranks: int = 1, losses: Stage2Losses | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a rank's half."""
    model = small_model()
    found = stage2_losses(model, losses or FULL, **part_of(joint_batch(), rank, ranks))
    found["loss"].backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# All four losses with the joint batch's gradient, and the official contrastive loss alone, gathered as by default: the
# gradient of the other losses knows nothing of ranks.
FULL = Stage2Losses(gather="full")
OFFICIAL = Stage2Losses(vtm=0.0, mlm=0.0, uta=0.0)


def gathered_gradients(path: Path, rank: int, ranks: int) -> list[Tensor]:
    """Loss, then the gradients at this rank's vision and text rows and at the temperature, of a gather_* file."""
    tensors = load_file(path)
    size = len(tensors["in.idx"]) // ranks
    rows = slice(rank * size, (rank + 1) * size)
    vision, text = (tensors[key][rows].requires_grad_() for key in ("in.vision", "in.text"))
    temperature = tensors["in.temp"].view(()).requires_grad_()
    units = F.normalize(vision, dim=-1).mean(1), F.normalize(text, dim=-1)
    loss = vision_text.contrastive_loss(vision_text.similarity(*units, tensors["in.idx"][rows], temperature))
    loss.backward()
    return [loss.detach(), vision.grad, text.grad, temperature.grad]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Losses and gradients averaged over two processes: of FULL, and of OFFICIAL; then gathered_gradients of every file, by
    rank."""
    folder = tmp_path_factory.mktemp("ranks")
    program = (
        "import sys, torch, torch.distributed as dist\n"
        "from tests.objectives.test_stage2_ranks import OFFICIAL, gathered_gradients, gradients_of, parity_files\n"
        "dist.init_process_group('gloo')\n"
        "every = []\n"
        "for losses in (None, OFFICIAL):\n"
        "    parts = gradients_of(dist.get_rank(), 2, losses)\n"
        "    for value in (*parts[0].values(), *parts[1].values()):\n"
        "        dist.all_reduce(value.detach())\n"
        "    every.append([{k: v.detach() / 2 for k, v in part.items()} for part in parts])\n"
        "files = []\n"
        "for path in parity_files('gather'):\n"
        "    by_rank = [None, None]\n"
        "    dist.all_gather_object(by_rank, gathered_gradients(path, dist.get_rank(), 2))\n"
        "    files.append(by_rank)\n"
        "every.append(files)\n"
        "if dist.get_rank() == 0:\n"
        "    torch.save(every, sys.argv[1])\n"
        "dist.destroy_process_group()\n"
    )
    saved = folder / "mean.pt"
    run_ranks(folder / "ranks.py", program, saved)
    return torch.load(saved, weights_only=True)


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_give_the_loss_and_gradients_of_one(of_two_ranks) -> None:
    two_losses, two_gradients = of_two_ranks[0]
    losses, gradients = gradients_of()
    for name, value in losses.items():
        torch.testing.assert_close(two_losses[name], value.detach(), rtol=1e-5, atol=1e-6)
    assert two_gradients.keys() == gradients.keys() and len(gradients) > 80
    for name, value in gradients.items():
        torch.testing.assert_close(two_gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.process
@pytest.mark.slow
def test_official_gathering_keeps_a_share_of_the_gradient_but_not_at_the_temperature(of_two_ranks) -> None:
    two_losses, two_gradients = of_two_ranks[1]
    losses, gradients = gradients_of(losses=OFFICIAL)  # one process: nothing is gathered
    torch.testing.assert_close(two_losses["loss"], losses["loss"].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two_gradients.pop("temp"), gradients.pop("temp"), rtol=1e-4, atol=1e-6)
    assert two_gradients.keys() == gradients.keys() and len(gradients) > 40
    for name, value in gradients.items():
        torch.testing.assert_close(two_gradients[name], value / 2, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(parity_files("gather"))), ids=lambda n: parity_files("gather")[n].name)
def test_parity_of_the_default_gathering_with_the_official_one(of_two_ranks, number: int) -> None:
    """Gradients of each rank at its own rows as the official code's two processes computed them, to the last factor."""
    expected, by_rank = load_file(parity_files("gather")[number]), of_two_ranks[2][number]
    losses, visions, texts, temperatures = zip(*by_rank, strict=True)
    torch.testing.assert_close(sum(losses).view(1) / 2, expected["out.loss"])
    torch.testing.assert_close(torch.cat(visions), expected["grad.vision"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat(texts), expected["grad.text"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(temperatures).view(1) / 2, expected["grad.temp"], rtol=1e-4, atol=1e-6)


def test_a_rank_alone_would_differ() -> None:
    """The contrastive loss of a half without the other half's rows is another loss, so the test above can fail."""
    whole, _ = gradients_of()
    halves = [gradients_of(rank, 2)[0]["vtc"] for rank in range(2)]
    assert abs(sum(halves) / 2 - whole["vtc"]) > 0.1


@pytest.mark.parametrize("name", ["vtc", "vtm", "mlm", "uta"])
def test_each_loss_has_its_switch(name: str) -> None:
    model, part = small_model(), part_of(joint_batch(), 0, 1)
    whole = stage2_losses(model, Stage2Losses(), **part)
    without = stage2_losses(model, Stage2Losses(**{name: 0.0}), **part)
    assert name not in without
    torch.testing.assert_close(without["loss"] + whole[name], whole["loss"])
