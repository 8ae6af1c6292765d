"""`eval classify`: one view and many, ranks, official files in every wrapping, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.assets import tiny
from umt_fast.__main__ import main
from umt_fast.config import VitConfig
from umt_fast.data.decode.classification_crops import validation_view
from umt_fast.data.decode.classification_frames import KineticsSparse, Ssv2
from umt_fast.data.decode.multi_view import MultiViewReader
from umt_fast.data.decode.video import decode_frames
from umt_fast.models.classifier import Classifier
from umt_fast.models.description import base_description
from umt_fast.models.weights import load_state
from umt_fast.models.weights.finetune import start_classifier

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("test.mp4", "demo.mp4", "part_0.mp4", "demo_spatiotemporal_det.mp4", "video_0.mov")
CLASSES = 7


def classifier(frames: int = 4) -> Classifier:
    torch.manual_seed(5)
    vit = VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=frames, drop_path=0.0)
    return Classifier(vit, CLASSES, head_scale=30.0).eval()


@pytest.fixture
def judged(tmp_path: Path, shared: Path) -> tuple[Path, Path]:
    """A checkpoint of a model and a list of real videos."""
    config = tiny.classes()
    config.num_classes, config.student.position_grid = CLASSES, (8, 14, 14)
    description = base_description("classification", config) | {"num_classes": CLASSES}
    torch.save({"model": classifier().state_dict(), "model_config": description}, tmp_path / "model.pt")
    (tmp_path / "list.csv").write_text("".join(f"{shared}/videos/{n},{i % 3}\n" for i, n in enumerate(NAMES)))
    return tmp_path / "model.pt", tmp_path / "list.csv"


def evaluate(capsys: pytest.CaptureFixture, *words: object) -> dict:
    capsys.readouterr()
    code = main([str(word) for word in ("eval", "classify", *words, "--device", "cpu", "--workers", 0)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def refused(capsys: pytest.CaptureFixture, *words: object, lines: int = 1) -> str:
    capsys.readouterr()
    assert main([str(word) for word in ("eval", "classify", *words, "--device", "cpu", "--workers", 0)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.strip().splitlines()) <= lines
    return said


def probabilities(views: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return classifier()(torch.from_numpy(views)).softmax(1).double().mean(0)


@pytest.mark.parametrize(
    ("options", "rule", "segments", "crops"),
    [
        ((), KineticsSparse(), 1, 1),
        (("--frames", "ssv2"), Ssv2(), 1, 1),
        (("--segments", 4, "--crops", 3), KineticsSparse(), 4, 3),
        (("--segments", 2, "--crops", 3, "--frames", "ssv2", "--batch_size", 4), Ssv2(), 2, 3),
        (("--segments", 5, "--batch_size", 100), KineticsSparse(), 5, 1),
    ],
)
def test_figures_and_scores(
    options: tuple, rule: object, segments: int, crops: int, judged: tuple, tmp_path: Path, capsys, shared: Path
) -> None:
    """Against the probabilities of each clip, read and averaged one after another."""
    file, table = judged
    figures = evaluate(capsys, file, table, *options, "--scores", tmp_path / "scores.json")
    wanted = []
    for name in NAMES:
        path = shared / "videos" / name
        if segments * crops == 1:
            views = validation_view(decode_frames(path, lambda count: rule.validation(count, 4)), 32)[None]
        else:
            views = MultiViewReader(rule, 4, 32, segments, crops).read(path)
        wanted.append(probabilities(views))
    wanted, label = torch.stack(wanted), torch.arange(len(NAMES)) % 3
    right = wanted.argmax(1) == label
    top5 = (wanted.topk(5).indices == label[:, None]).any(1)
    classes = [right[label == number].double().mean().item() for number in range(3)]
    assert figures == {
        "top1": pytest.approx(right.double().mean().item()),
        "top5": pytest.approx(top5.double().mean().item()),
        "mean_class": pytest.approx(sum(classes) / 3),
        "clips": len(NAMES),
        "views": segments * crops,
    }
    scores = json.loads((tmp_path / "scores.json").read_text())
    for row, entry, name in zip(wanted, scores["clips"], NAMES, strict=True):
        assert entry["clip"].endswith(name)
        shares, best = row.topk(5)
        assert [number for number, _ in entry["found"]] == best.tolist()
        assert [share for _, share in entry["found"]] == pytest.approx(shares.tolist(), abs=2e-5)
    assert scores["accuracy_of_class"] == {str(number): pytest.approx(value) for number, value in enumerate(classes)}


@pytest.mark.slow
def test_two_ranks_count_each_clip_once(judged: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Five clips over two ranks."""
    file, table = judged
    options = ["--segments", "2", "--crops", "3", "--device", "cpu", "--workers", "0"]
    alone = evaluate(capsys, file, table, "--segments", 2, "--crops", 3, "--scores", tmp_path / "alone.json")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "umt_fast"]
    words = ["eval", "classify", str(file), str(table), *options, "--scores", str(tmp_path / "two.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == alone
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "alone.json").read_text())


def test_official_files_are_judged_converted_and_started_from(
    judged: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`model`, `module`, flat, a deepspeed folder, each with the position table of 16 frames."""
    _, table = judged
    page = tmp_path / "page.py"
    page.write_text(
        "from tests.assets import tiny\nDEFAULT = 'long'\n\ndef long():\n    config = tiny.classes()\n"
        f"    config.num_classes, config.student.num_frames = {CLASSES}, 16\n"
        "    config.student.position_grid = (8, 2, 2)\n    return config\n"
    )
    model = classifier(16)
    official = {key: value.clone() for key, value in model.state_dict().items()}
    official["pos_embed"] = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(1)) / 5
    folder = tmp_path / "deepspeed" / "checkpoint-best"
    folder.mkdir(parents=True)
    for content, path in (
        ({"model": official}, tmp_path / "model.pth"),
        ({"module": official}, tmp_path / "module.pth"),
        (official, tmp_path / "flat.pth"),
        ({"module": official}, folder / "mp_rank_00_model_states.pt"),
    ):
        torch.save(content, path)
    found = []
    for source in ("model.pth", "module.pth", "flat.pth", "deepspeed/checkpoint-best"):
        found.append(evaluate(capsys, tmp_path / source, table, "--model", f"{page}:long", "--segments", 2))
        # Back to the official keys and values.
        out = tmp_path / "again.pth"
        assert main(["convert", str(tmp_path / source), str(out)]) == 0
        again = load_state(out)
        assert again.keys() == official.keys() and all(torch.equal(again[key], official[key]) for key in official)
        fresh = Classifier(VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=16), CLASSES)
        start_classifier(fresh, tmp_path / source)
        assert torch.equal(fresh.position, official["pos_embed"][0])
        assert torch.equal(fresh.head.weight, official["head.weight"])
    assert all(figures == found[0] for figures in found)


def test_a_run_of_other_length_is_converted_with_its_position_table(tmp_path: Path) -> None:
    config = tiny.classes()
    config.student.num_frames, config.student.position_grid, config.num_classes = 8, (4, 2, 2), CLASSES
    description = base_description("classification", config) | {"num_classes": CLASSES}
    model = Classifier(config.student, CLASSES)
    average = {key: value + 1 for key, value in model.state_dict().items()}
    content = {"model": model.state_dict(), "model_config": description, "model_ema": average}
    torch.save(content, tmp_path / "run.pt")
    assert main(["convert", str(tmp_path / "run.pt"), str(tmp_path / "plain.safetensors")]) == 0
    plain = load_state(tmp_path / "plain.safetensors")
    assert set(plain) == {*model.state_dict(), "pos_embed"} and torch.equal(plain["pos_embed"][0], model.position)
    assert main(["convert", str(tmp_path / "run.pt"), str(tmp_path / "mean.pth"), "--averaged"]) == 0
    mean = load_state(tmp_path / "mean.pth")
    assert torch.equal(mean["head.weight"], average["head.weight"])
    assert main(["convert", str(tmp_path / "plain.safetensors"), str(tmp_path / "x.pth"), "--averaged"]) == 2


def test_bad_input_is_one_line(judged: tuple, tmp_path: Path, capsys: pytest.CaptureFixture, shared: Path) -> None:
    file, table = judged
    good = table.read_text().splitlines()[0]
    (tmp_path / "outside.csv").write_text(f"{good}\n{shared}/videos/demo.mp4,7\n{shared}/videos/demo.mp4,7\n")
    assert ": the labels of 2 of its 3 clips lie outside 0 to 6, the lowest is 7" in refused(
        capsys, file, tmp_path / "outside.csv"
    )
    (tmp_path / "empty.csv").write_text("")
    assert "empty.csv" in refused(capsys, file, tmp_path / "empty.csv")
    (tmp_path / "absent.csv").write_text(f"{good}\nabsent.mp4,1\n")
    for options in ((), ("--segments", 2, "--crops", 3)):
        assert "1 of the 2 files of the list are not there, the first: " in refused(
            capsys, file, tmp_path / "absent.csv", *options
        )
    assert "3 test segments of SSV2" in refused(capsys, file, table, "--segments", 3, "--frames", "ssv2")
    assert "sampling_rate is 2, but frames kinetics have no stride" in refused(
        capsys, file, table, "--sampling_rate", 2
    )
    assert "segments is 0" in refused(capsys, file, table, "--segments", 0, lines=9)
    content = torch.load(file, weights_only=True)
    wrong = tmp_path / "wrong.pt"
    torch.save(content | {"model": content["model"] | {"head.weight": torch.zeros(9, 32)}}, wrong)
    assert "head.weight is (9, 32) in the file and (7, 32) in the model" in refused(capsys, wrong, table)
    torch.save(content | {"model": content["model"] | {"head.bias": torch.full((7,), float("nan"))}}, wrong)
    assert "logits are not finite" in refused(capsys, wrong, table)


def test_a_damaged_video_gives_the_views_of_what_decodes(
    judged: tuple, tmp_path: Path, capsys: pytest.CaptureFixture, shared: Path
) -> None:
    """Its header says 50 frames and 28 decode: every segment lies within those."""
    file, _ = judged
    path = shared / "videos" / "corrupted.mp4"
    (tmp_path / "damaged.csv").write_text(f"{path},1\n")
    options = ("--segments", 4, "--crops", 3, "--scores", tmp_path / "scores.json")
    assert evaluate(capsys, file, tmp_path / "damaged.csv", *options)["views"] == 12
    (entry,) = json.loads((tmp_path / "scores.json").read_text())["clips"]
    reader = MultiViewReader(KineticsSparse(), 4, 32, 4, 3)
    wanted = probabilities(reader.read(path, 28))
    assert dict(map(tuple, entry["found"]))[wanted.argmax().item()] == pytest.approx(wanted.max().item(), abs=2e-5)
