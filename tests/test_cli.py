"""The command line: what it accepts, and one clear error for each thing it cannot work with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from umt_fast.__main__ import main

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = "tests/assets/tiny.py"
LONG = "/folder" * 30  # longer than a line of a terminal


def fails(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Runs a command that must fail and returns its error text."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, f"exit status {code}, output {captured}"
    assert "Traceback" not in captured.err
    if captured.err.startswith("umt_fast: error: "):
        assert len(captured.err.splitlines()) == 1
        return captured.err
    # tyro's box: the words without its lines.
    return " ".join(re.sub("[│╭╮╰╯─]|[-+]{3,}|[|] | [|]", " ", captured.err).split())


@pytest.fixture(autouse=True)
def at_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("COLUMNS", "9000")  # tyro breaks words longer than a line


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("train", "plan", "scan", "prepare", "bench", "eval", "convert", "report", "quickstart"):
        assert f"\n  {command} " in text


def test_help_of_a_recipe_lists_every_key(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "stage1_k710", "--help"]) == 0
    text = capsys.readouterr().out
    for key in ("--run.batch_size", "--mask.ratio", "--optim.weight_decay", "--data.num_sample", "--student.drop_path"):
        assert key in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "needs a recipe"),
        (["train", "stage1_k71"], "did you mean 'stage1_k710'"),
        (["train", "stage1_k710:l61"], "did you mean 'l16'"),
        (["train", "missing.py"], "no recipe page at missing.py"),
        (["train", "recipes/k40.py:l16"], "no recipe page at recipes/k40.py; did you mean recipes/k400.py?"),
        (["train", "stage1_k710", "--mask.raito", "0.5"], "--mask.raito, 0.5 Perhaps you meant: --mask.ratio"),
        (["train", "stage1_k710", "--run.dtype", "fp16"], "invalid choice 'fp16' for argument '--run.dtype'"),
        (["train", "stage1_k710", "--run.batch_size"], "Missing value for argument '--run.batch_size'"),
        (["train", "stage1_k710", "--data.frame_pattern", "img_%05d.jpg"], "data.frame_pattern is 'img_%05d.jpg'"),
        (["scan", "list.csv", "--out", "x", "--frame_pattern", "{0.name}.jpg"], "frame_pattern is '{0.name}.jpg'"),
        (["scan", "list.csv", "--out", "x", "--frame_pattern", "{0[1]}.jpg"], "frame_pattern is '{0[1]}.jpg'"),
        (["plan", "stage1_k710", "--run.batchsize", "7"], "meant: --run.batch_size"),
        (["scan", "list.csv"], "scan needs either --out MANIFEST, to write one, or --verify"),
        (
            ["scan", "list.csv", "--out", "x", "--wokers", f"{LONG},2"],
            f"--wokers, {LONG},2 Perhaps you meant: --workers",
        ),
        (["scan", "list.csv", "--out", "tests"], "tests cannot be written: it is a folder"),
        (["prepare", "list.csv", "--out", "pyproject.toml"], "pyproject.toml is a file"),
        (["eval", "classify", "no/such/checkpoint.pt", "list.csv", "--out", "no/figures.json"], "no is not a folder"),
        (["eval", "classify", "no/such/checkpoint.pt", "list.csv", "--scores", "tests"], "tests cannot be written"),
        (
            ["eval", "classify", "no/such/checkpoint.pt", "list.csv", "--out", "/sys/figures.json"],
            "/sys/figures.json cannot be",
        ),
        (["convert", "no/such/file.pt", "/sys/out.safetensors"], "/sys/out.safetensors cannot be written"),
        (["convert", "no/such/file.pt", "tests"], "tests cannot be written: it is a folder"),
        (["train", "stage1_k710", "--mask.ratio", "1.5"], "mask.ratio is 1.5"),
        (["train", "stage1_k710", "--run.batch_size", "many"], "many"),
        (["train", "stage1_k710"], "data.train is empty"),
        (["train", "stage1_k710", "--teacher.num_heads", "0"], "teacher.num_heads is 0"),
        (["train", "stage1_k710", "--student.mlp_ratio", "-1"], "student.mlp_ratio is -1"),
        (["train", "stage1_k710", "--optim.lr_batch", "-5"], "optim.lr_batch is -5"),
        (["train", "stage1_k710", "--optim.lr", "inf"], "optim.lr is inf"),
        (["train", "stage1_k710", "--optim.betas", "2", "0.9"], "optim.betas are"),
        (["train", "stage2", "--embed_dim", "0"], "embed_dim is 0"),
        (["train", "stage2", "--text.num_heads", "0"], "text.num_heads is 0"),
        (["scan", "pyproject.toml", "--out", "./pyproject.toml"], "is an input of this command"),
        (["convert", "pyproject.toml", "pyproject.toml"], "is an input of this command"),
        (["eval", "classify", "pyproject.toml", "list.csv", "--out", "pyproject.toml"], "is an input of this command"),
        (["prepare", "no/such/list.csv", "--out", "x"], "no list at no/such/list.csv"),
        (["prepare", "list.csv", "--out", "x", "--shard", "one"], "--shard is 'one'"),
        (["prepare", "list.csv", "--out", "x", "--shard", "2/2"], "i from 0 to n - 1"),
        (["prepare", "list.csv", "--out", "x", "--per_segment", "0"], "per_segment is 0"),
        (["prepare", "list.csv", "--out", "x", "--seed", "-1"], "--seed is -1; it must not be negative"),
        (["prepare", "list.csv", "--out", "x", "--seed", str(2**80)], "it must be below 2^63"),
        (["prepare", "list.csv", "--out", "x", "--shard_mib", "-1"], "--shard_mib is -1"),
        (["prepare", "list.csv", "--out", "x", "--shard_mib", "0"], "give at least 1 MiB"),
        (["prepare", "list.csv", "--out", "x", "--workers", "-1"], "--workers is -1"),
        (["scan", "list.csv", "--out", "x", "--workers", "-1"], "--workers is -1"),
        (
            ["eval", "retrieve", "pyproject.toml", "list.csv", "--memory_gib", "inf"],
            "memory_gib is inf; it must be a finite number",
        ),
        (["eval", "retrieve", "pyproject.toml", "list.csv", "--memory_gib", "nan"], "memory_gib is nan"),
        (["eval", "classify", "pyproject.toml", "list.csv", "--workers", "-1"], "workers is -1"),
        (["quickstart", "--seed", "-1"], "--seed is -1"),
        (["plan", "stage1_k710", "--decode", "inf"], "decode is inf"),
        (["train", "stage2", "--losses.vtc", "inf"], "losses.vtc is inf"),
        (["train", "stage2", "--text.init_std", "inf"], "text.init_std is inf"),
        (["train", "stage1_k710", "--student.mlp_ratio", "inf"], "student.mlp_ratio is inf"),
        (["train", "stage1_k710", "--run.seed", str(2**80)], "run.seed is"),
        (["train", "stage1_k710", "--run.max_steps", str(2**80)], "run.max_steps is"),
        (["train", "tests/assets/tiny.py:classes", "--head_scale", "nan"], "head_scale is nan"),
        (
            ["train", "stage1_k710", "--student.image_size", "528", "--teacher.image_size", "528"],
            "at most 1024 tokens of a",
        ),
        (
            [
                "train",
                "stage2",
                "--images",
                "x",
                "--student.image_size",
                "528",
                "--teacher.image_size",
                "528",
                "--mask.kind",
                "tube",
            ],
            "image_mask.kind 'semantic' draws from at most 1024 tokens",
        ),
        (
            [
                "train",
                "stage1_k710",
                "--student.image_size",
                "384",
                "--teacher.image_size",
                "384",
                "--mask.kind",
                "random",
            ],
            "at most 4096 tokens of a clip, and student.image_size 384 with student.patch_size 16 makes 4608",
        ),
        (
            ["train", "stage1_k710", "--student.image_size", "1040", "--teacher.image_size", "1040"],
            "choose smaller pictures or larger patches",
        ),
        (
            ["train", TINY, "--student.image_size", "528", "--teacher.image_size", "528", "--mask.kind", "random"],
            "choose mask.kind 'tube', smaller pictures",
        ),
        (["train", TINY, "--student.mlp_ratio", "0.001"], "mlp_ratio is 0.001; it must be at least 1 / student.width"),
        (
            ["bench", "stage1", "--model", "tiny", "--dtype", "fp32", "--batch_size", str(10**14)],
            f"bench stage1 --model tiny --dtype fp32 --batch_size {10**14} does not fit into memory",
        ),
        (["scan", "list.csv", "--out", "pyproject.toml/x"], "cannot be written: pyproject.toml is not a folder"),
        (
            ["eval", "classify", "a.pt", "list.csv", "--out", "x.json", "--scores", "./x.json"],
            "are both x.json; give two files",
        ),
        (["eval", "classify", "tests", "list.csv"], "the folder tests is not a checkpoint; give a checkpoint-*.pt"),
        (["convert", "tests", "out.safetensors"], "the folder tests is not a checkpoint; give a checkpoint-*.pt"),
        (["scan", "x.csv", "--out", "m.jsonl", "--separator", ""], "--separator is empty; give the character"),
        (["prepare", "x.csv", "--out", "p", "--frame_pattern", "a.jpg"], "--frame_pattern is 'a.jpg'; it must hold"),
        (["quickstart", "--out", __file__], "test_cli.py, which is a file; give the name of a folder"),
        (["bench", "stage3"], "unknown benchmark 'stage3'; did you mean 'stage2'? There are: stage1"),
        (["bench", "finetun"], "unknown benchmark 'finetun'; did you mean 'finetune'?"),
        (["bench", "stage1", "--steps", "0"], "steps is 0"),
        (["report", "no/such/run"], "no run folder"),
        (
            ["eval", "classify", "no/such/checkpoint.pt", "list.csv"],
            "no weights at no/such/checkpoint.pt, and no",
        ),
        (["eval", "classify", "pyproject.toml", "list.csv"], "not a checkpoint"),
        (["convert", "no/such/file.pt", "out.safetensors"], "no weights at no/such/file.pt, and no released file"),
        (["convert", "pyproject.toml", "out.safetensors"], "not a readable weights file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(arguments: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert expected in fails(capsys, *arguments)


def test_the_systems_errors_name_the_file_first(tiny_list: Path, capsys: pytest.CaptureFixture) -> None:
    said = fails(capsys, "prepare", tiny_list, "--out", "/dev/null/x", "--workers", "0")
    assert said == "umt_fast: error: /dev/null/x: Not a directory\n"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["eval", "classify", "a.pt", "list.csv"], ["bench", "stage1"], ["bench", "fidelity"]):
        assert "torch sees no GPU; use --device cpu" in fails(capsys, *command, "--device", "cuda")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "videos.csv"),
        ("", "empty"),
        ("a.mp4,0\nb.mp4\n", "line 2"),
        ("a.mp4,zero\n", "zero"),
        ("a.mp4 0\n", "separator"),
    ],
    ids=["missing", "empty", "malformed", "label", "separator"],
)
def test_bad_lists(content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    videos = tmp_path / "videos.csv"
    if content is not None:
        videos.write_text(content)
    assert expected in fails(capsys, "train", TINY, "--data.train", videos, "--run.out", tmp_path / "run")


@pytest.mark.parametrize("name", ["captions.json", "captions.sqlite", "captions.tar"])
def test_captions_where_labels_are_needed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / name
    path.write_bytes(b"SQLite format 3" if name.endswith("sqlite") else b'[\n {"video": "a.mp4", "caption": "a"}\n]')
    for arguments in (
        ["scan", path, "--out", tmp_path / "manifest.jsonl"],
        ["train", f"{TINY}:classes", "--data.train", path, "--run.out", tmp_path / "run"],
    ):
        said = fails(capsys, *arguments)
        assert f"{path} holds captions" in said and "`prepare`" in said and len(said.splitlines()) == 1


def test_frame_folders_of_another_pattern(tmp_path: Path) -> None:
    """`scan` and `prepare` find the files; `eval` takes the option, too."""
    from PIL import Image

    for clip in ("a", "b"):
        (tmp_path / clip).mkdir()
        for number in range(1, 6):
            Image.new("RGB", (40, 40), (40 * number, 0, 0)).save(tmp_path / clip / f"frame-{number}.png")
    table, pattern = tmp_path / "list.csv", ["--frame_pattern", "frame-{}.png"]
    table.write_text("a,5,0\nb,5,1\n")
    assert main(["scan", str(table), "--out", str(tmp_path / "m.jsonl"), *pattern]) == 0
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2
    assert main(["prepare", str(table), "--out", str(tmp_path / "out"), "--workers", "0", *pattern]) == 0
    run = ["--run.out", str(tmp_path / "run"), "--data.train", str(table), "--data.frame_pattern", pattern[1]]
    assert main(["train", f"{TINY}:classes", *run]) == 0
    checkpoint = str(next((tmp_path / "run").glob("checkpoint-*3.pt")))
    assert main(["eval", "classify", checkpoint, str(table), "--workers", "0", *pattern]) == 0


@pytest.mark.parametrize("content", [b"a,b\n", b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00N.", b"PK\x03\x04cut"])
def test_what_is_no_weights_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    """In a process of its own: what libraries have to say comes once per process."""
    (tmp_path / "x.pt").write_bytes(content)
    program = (
        "import sys; from umt_fast.__main__ import main\n"
        "print(main(['convert', sys.argv[1], sys.argv[1] + '.safetensors']))\n"
        "print(main(['eval', 'classify', sys.argv[1], 'list.csv']))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x.pt"], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "2"], done.stderr
    first, second = done.stderr.splitlines()
    assert "not a readable weights file" in first and "is not a checkpoint of an umt_fast run" in second


def test_weights_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture, tiny_list: Path) -> None:
    import torch

    weights = tmp_path / "student.pt"
    torch.save({"model": {"encoder.norm.weight": torch.ones(7)}}, weights)
    text = fails(capsys, "train", TINY, "--data.train", tiny_list, "--run.out", tmp_path / "run", "--init", weights)
    assert "encoder.norm.weight" in text


def test_out_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture, tiny_list: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "file" in fails(capsys, "train", TINY, "--data.train", tiny_list, "--run.out", blocked / "run")


@pytest.mark.process
def test_train_leaves_checkpoint_and_metrics(tmp_path: Path, tiny_list: Path) -> None:
    """The whole command in a process of its own, worker processes included."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "umt_fast", "train", TINY, "--data.train", str(tiny_list), "--run.out", str(out)]
    done = subprocess.run([*command, "--data.workers", "2"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "untrained" in done.stderr
    assert list(out.glob("checkpoint-*.pt"))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and '"loss"' in lines[-1]


def test_convert_to_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "a.pt")
    for name in ("b.safetensors", "b.pth"):
        assert "cannot be written" in fails(capsys, "convert", tmp_path / "a.pt", tmp_path / "none" / name)


def test_labels_that_are_no_class_are_refused(tiny_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_list.write_text(tiny_list.read_text().replace(",1", ",7"))
    page = f"{REPOSITORY}/tests/assets/tiny.py:classes"
    assert main(["train", page, "--data.train", str(tiny_list), "--run.out", str(tmp_path / "run")]) == 2
    assert ": the labels of 1 of its 2 clips lie outside 0 to 1, the lowest is 7; correct" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "tower"),
    [
        ("student.mlp_ratio", 2**50, "allocate"),
        ("student.width", 2**56, f"student.width {2**56}"),
        ("teacher.width", 2**40, f"teacher.width {2**40}"),
    ],
)
def test_a_model_larger_than_memory(
    option: str, value: int, tower: str, tiny_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = fails(capsys, "train", TINY, "--data.train", tiny_list, "--run.out", tmp_path / "run", f"--{option}", value)
    assert "does not fit into memory" in said and tower in said and len(said.splitlines()) == 1
