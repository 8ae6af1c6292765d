"""The commands as a user chains them: each takes what the one before it left, on one rank and on two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import at_repository as at_repository
from tests.test_cli import fails
from umt_fast.__main__ import main

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = "tests/assets/tiny.py"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("evaluation", ["classify", "retrieve"])
def test_two_ranks_judge_as_one_process(
    evaluation: str, tmp_path: Path, tiny_list: Path, capsys: pytest.CaptureFixture
) -> None:
    """Figures and scores, of which torchrun prints one line."""
    table, page, data = tiny_list, f"{TINY}:classes", ["--data.train", str(tiny_list)]
    if evaluation == "retrieve":
        table, page = tiny_list.with_name("captions.json"), f"{TINY}:captions"
        table.write_text(
            json.dumps([{"video": f"video{n}.mp4", "caption": "a red thing"[: 3 + 2 * n]} for n in (0, 1)])
        )
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        data = ["--videos", str(table), "--tokenizer", str(tmp_path)]
    assert main(["train", page, *data, "--run.out", str(tmp_path / "run"), "--run.max_steps", "1"]) == 0
    (newest,) = (tmp_path / "run").glob("checkpoint-*1.pt")
    words = ["eval", evaluation, str(newest), str(table), "--workers", "0", "--device", "cpu", "--scores"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    capsys.readouterr()
    assert main([*words, str(one)]) == 0
    printed = json.loads(capsys.readouterr().out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "umt_fast"]
    done = subprocess.run([*launch, *words, str(two)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line) == printed and json.loads(two.read_text()) == json.loads(one.read_text())


def test_pre_train_convert_fine_tune_evaluate(tmp_path: Path, tiny_list: Path, capsys: pytest.CaptureFixture) -> None:
    """The chain a user goes through, each command taking what the one before it left."""
    import torch
    from safetensors.torch import load_file

    stage1, tuned, weights = tmp_path / "stage1", tmp_path / "tuned", tmp_path / "student.safetensors"
    data = ["--data.train", str(tiny_list)]
    assert main(["train", TINY, *data, "--run.out", str(stage1)]) == 0
    (newest,) = stage1.glob("checkpoint-*3.pt")
    assert main(["convert", str(newest), str(weights)]) == 0
    saved = torch.load(newest, weights_only=True)["model"]
    converted = load_file(weights)
    assert saved.keys() == converted.keys() and all(torch.equal(saved[key], converted[key]) for key in saved)
    assert "does not" not in capsys.readouterr().err
    arguments = ["train", f"{TINY}:classes", *data, "--run.out", str(tuned), "--init", str(weights)]
    assert main(arguments) == 0
    (newest_tuned,) = tuned.glob("checkpoint-*3.pt")
    capsys.readouterr()
    figures = tmp_path / "figures.json"
    scores = tmp_path / "scores.json"
    outputs = ["--out", str(figures), "--scores", str(scores)]
    assert main(["eval", "classify", str(newest_tuned), str(tiny_list), "--workers", "0", *outputs]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(figures.read_text()) and printed["clips"] == 2 and printed["top5"] == 1.0
    clips = json.loads(scores.read_text())["clips"]
    assert [(clip["clip"], clip["label"]) for clip in clips] == [(str(tmp_path / f"video{n}.mp4"), n) for n in (0, 1)]
    assert sum(clip["found"][0][0] == clip["label"] for clip in clips) == 2 * printed["top1"]
    assert all(sum(share for _, share in clip["found"]) == pytest.approx(1, abs=1e-4) for clip in clips)
    assert "Unrecognized options: --top_k, 5" in fails(
        capsys, "eval", "classify", newest_tuned, tiny_list, "--top_k", "5"
    )
    said = fails(capsys, "eval", "retrieve", newest_tuned, tiny_list)
    assert "is of task 'classification', which `eval retrieve` does not judge: `eval classify`" in said
    others = tiny_list.with_name("others.csv")
    others.write_text("video0.mp4,5\n")
    said = fails(capsys, "eval", "classify", newest_tuned, others)
    assert "the lowest is 5; this classifier knows no others" in said and "num_classes" not in said
    broken = torch.load(newest_tuned, weights_only=True)
    broken["model"]["head.bias"].fill_(float("nan"))
    torch.save(broken, tmp_path / "broken.pt")
    assert "logits are not finite" in fails(
        capsys, "eval", "classify", tmp_path / "broken.pt", tiny_list, "--workers", "0"
    )
    del broken["model"]["head.bias"]
    torch.save(broken, tmp_path / "broken.pt")
    assert "broken.pt does not fit the configured model: 1 missing: head.bias" in fails(
        capsys, "eval", "classify", tmp_path / "broken.pt", tiny_list
    )
    assert "of a stage-1 run" in fails(capsys, "eval", "classify", newest, tiny_list)


def test_stage_2_from_stage_1_weights_and_resumed(
    tmp_path: Path, tiny_list: Path, capsys: pytest.CaptureFixture
) -> None:
    """Captioned clips and images in, checkpoint out; stopped within the second epoch of two it continues exactly."""
    import torch
    from PIL import Image

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing"]))
    table = tiny_list.with_name("captions.json")
    entries = [{"video": f"video{number % 2}.mp4", "caption": "a red thing"[: 3 + 2 * number]} for number in range(4)]
    table.write_text(json.dumps(entries))
    Image.new("RGB", (50, 40), "red").save(tiny_list.with_name("red.png"))
    pictures = tiny_list.with_name("pictures.json")
    pictures.write_text(json.dumps([{"image": "red.png", "caption": "red"}] * 2))
    stage1 = tmp_path / "stage1"
    assert main(["train", TINY, "--data.train", str(tiny_list), "--run.out", str(stage1)]) == 0
    (weights,) = stage1.glob("checkpoint-*3.pt")
    base = [
        "train",
        f"{TINY}:captions",
        "--videos",
        str(table),
        "--images",
        str(pictures),
        "--tokenizer",
        str(tmp_path),
        "--init",
        str(weights),
    ]
    for name, stops in (("whole", [6]), ("parts", [4, 6])):
        for stop in stops:
            assert main([*base, "--run.out", str(tmp_path / name), "--run.max_steps", str(stop)]) == 0
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for key in ("step", "loss", "vtc", "vtm", "mlm", "uta"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]] and len(rows[0]) == 6
    saved = torch.load(next((tmp_path / "whole").glob("checkpoint-*6.pt")), weights_only=True)["model"]
    assert "vision_encoder.encoder.norm.weight" in saved and "text_encoder.cls.predictions.decoder.weight" in saved
    newest = next((tmp_path / "whole").glob("checkpoint-*6.pt"))
    capsys.readouterr()
    scores = tmp_path / "scores.json"
    options = ["--workers", "0", "--top_k", "2", "--scores", str(scores)]
    assert main(["eval", "retrieve", str(newest), str(table), *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["clips"] == 2 and figures["captions"] == 4
    assert {"dual_t2v_r1", "match_t2v_r1", "match_v2t_median_rank", "match_r_mean"} <= figures.keys()
    written = json.loads(scores.read_text())
    assert len(written["t2v"]) == 4 and len(written["v2t"][0]["found"]) == 2 and not list(tmp_path.glob("*.writing"))
    for arguments, expected in (
        (("--max_length", "9"), "max_length is 9; it must lie in [2, 8]"),
        (("--top_k", "-1"), "top_k is -1"),
        (("--batch_size", "0"), "batch_size is 0"),
        (("--memory_gib", "-1"), "memory_gib is -1"),
        (("--captions", "all"), "all"),
        (("--scores", "no/such/folder/scores.json"), "no/such/folder is not a folder"),
        (("--separator", ";"), "Unrecognized options: --separator"),
        (("--frame_pattern", "{}.jpg"), "Unrecognized options: --frame_pattern"),
        (("--root", "no/such/folder"), "no/such/folder is not a folder"),
        (("--root", str(REPOSITORY)), "2 of the 2 files of"),
    ):
        assert expected in fails(capsys, "eval", "retrieve", newest, table, "--workers", "0", *arguments)
