"""Models by name and by file, and what they make of clips and texts, against the trainer's own modules and loaders."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertTokenizerFast

import umt_fast
from tests.videos import write_video
from umt_fast import recipe
from umt_fast.__main__ import main
from umt_fast.config import ConfigError, DataConfig
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.tokens import Tokens
from umt_fast.data.sources.lists import read_list
from umt_fast.models.classifier import Classifier
from umt_fast.models.description import MODELS
from umt_fast.models.weights import WeightsError, load_state, save_state
from umt_fast.tasks import task_of

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "tests" / "assets" / "tiny.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]


def trained(name: str) -> tuple[torch.nn.Module, dict]:
    """The module that a tiny run trains, with random weights, in evaluation mode; and its description."""
    config = recipe.load(f"{TINY}:{name}")
    torch.manual_seed(3)
    module = task_of(config).untrained(config).trainable.eval()
    return module, task_of(config).describe(config)


def saved(folder: Path, name: str) -> tuple[Path, torch.nn.Module]:
    module, described = trained(name)
    save_state(module.state_dict(), folder / f"{name}.safetensors", described)
    return folder / f"{name}.safetensors", module


@pytest.fixture
def tiny_list(tmp_path: Path) -> Path:
    """Two small videos whose every part and frame differs, so that frames, crops and filters show in the features."""
    rng, lines = np.random.default_rng(0), []
    for number in range(2):
        pictures = (rng.integers(0, 256, (10, 12, 3), np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(12))
        write_video(tmp_path / f"video{number}.mp4", pictures)
        lines.append(f"video{number}.mp4,{number}\n")
    table = tmp_path / "tiny.csv"
    table.write_text("".join(lines))
    return table


def batch_of(table: Path, sampling: str, augment: str) -> Tensor:
    """The pixels that evaluation reads: uint8 (B, T, S, S, 3)."""
    data = DataConfig(workers=0, sampling=sampling, augment=augment)
    loader = ClipLoader(read_list(table, data), data, num_frames=4, image_size=32, batch_size=2, train=False)
    (batch,) = loader
    return batch["video"]


def paths_of(table: Path) -> list[Path]:
    return [table.parent / line.split(",")[0] for line in table.read_text().splitlines()]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@torch.no_grad()
def test_features_of_a_student_are_the_trainers(tmp_path: Path, tiny_list: Path) -> None:
    path, student = saved(tmp_path, "tiny")
    model = umt_fast.load_model(weights=path, device="cpu")
    assert isinstance(model, umt_fast.StudentModel) and not any(p.requires_grad for p in model.parameters())
    video = batch_of(tiny_list, "sparse", "center")
    first, last = student.encoder(video, None, 2)
    found = model.features(paths_of(tiny_list), layers=(0, -1, 1))
    tokens = student.encoder.norm(last)
    assert torch.equal(found.tokens, tokens.view(2, 4, 2, 2, 32))
    torch.testing.assert_close(found.pooled, tokens.mean(1))
    assert set(found.layers) == {0, -1, 1}
    assert torch.equal(found.layers[0], first.view(2, 4, 2, 2, 32))
    assert torch.equal(found.layers[-1], found.layers[1]) and torch.equal(found.layers[1].flatten(1, 3), last)
    # The alignment heads of the trainer, from the tokens given here.
    heads = student.heads([student.encoder.norm(first), tokens], student.position.expand(2, -1, -1))
    again = student(video, student.encoder.all_visible(2))
    assert torch.allclose(heads, again, atol=1e-6)


def test_decoded_frames_are_read_like_the_file(tmp_path: Path, tiny_list: Path) -> None:
    from umt_fast.data.decode.video import decode_frames

    path, _ = saved(tmp_path, "captions")
    model = umt_fast.load_model(weights=path, device="cpu")
    files = paths_of(tiny_list)
    frames = np.stack([decode_frames(file, np.arange) for file in files])
    assert frames.shape == (2, 12, 40, 48, 3)
    expected = model.features(files).pooled
    assert torch.equal(model.features(frames).pooled, expected)
    assert torch.equal(model.features(torch.from_numpy(frames)).pooled, expected)
    assert torch.equal(model.features([frames[0], str(files[1])]).pooled, expected)
    assert torch.equal(model.features(frames[1]).pooled, expected[1:])
    # What is already cut as the model wants it goes in as it is.
    pixels = model.pixels(frames)
    assert pixels.shape == (2, 4, 32, 32, 3) and torch.equal(model.pixels(pixels), pixels)
    # Frames 1, 4, 7, 10 of 12 are the middles; two frames alone are filled up with the last.
    assert torch.equal(model.pixels(frames), model.pixels(frames[:, [1, 4, 7, 10]]))
    assert torch.equal(model.pixels(frames[:, :2]), model.pixels(frames[:, [0, 1, 1, 1]]))


@torch.no_grad()
def test_texts_and_videos_of_stage_2(tmp_path: Path, tiny_list: Path, words: Path) -> None:
    path, module = saved(tmp_path, "captions")
    model = umt_fast.load_model(weights=path, device="cpu", tokenizer=words)
    assert isinstance(model, umt_fast.VideoTextModel)
    video = batch_of(tiny_list, "intervals", "whole")
    tokens, _ = module.vision_encoder.embed(video)
    expected = module.project_vision(module.vision_encoder.pool(tokens, 4))
    assert torch.equal(model.encode_video(paths_of(tiny_list)), expected)
    torch.testing.assert_close(model.features(video).pooled, module.vision_encoder.pool_norm(tokens.mean(1)))
    # Words by hand: [CLS] and the letters, no [SEP], lower case, without punctuation; cut at six.
    ids = [[2, 5, 6], [2, 7], [2, *range(5, 10)]]
    rows = [
        module.project_text(module.text_encoder.encode(torch.tensor([row]), torch.ones(1, len(row)).bool()))
        for row in ids
    ]
    found = model.encode_text(["A b.", "c", "a b c d e f g h"])
    torch.testing.assert_close(found, torch.cat(rows))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    texts = ["a b", "c"]
    torch.testing.assert_close(model.similarity(video, texts), expected @ torch.cat(rows[:2]).T)
    tokenizer = BertTokenizerFast.from_pretrained(words)
    pair, mask = Tokens(texts, tokenizer, max_length=6)[torch.arange(2)]
    hidden = module.text_encoder.encode(pair, mask)
    for clip in range(2):
        keys = module.text_encoder.clip_keys(tokens[clip : clip + 1].expand(2, -1, -1))
        logits = module.match(module.text_encoder.fuse(hidden[None], mask[None], keys))[0, :, 1]
        torch.testing.assert_close(model.match(video, texts)[clip], logits)


@torch.no_grad()
def test_classes(tmp_path: Path, tiny_list: Path) -> None:
    path, module = saved(tmp_path, "classes")
    model = umt_fast.load_model(weights=path, device="cpu")
    assert isinstance(model, umt_fast.ClassifierModel)
    video = batch_of(tiny_list, "sparse", "center")
    logits = module(video)
    assert torch.equal(model.logits(paths_of(tiny_list)), logits)
    found = model.predict(video)
    assert torch.equal(found.classes, logits.argsort(1, descending=True))
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2))
    assert torch.equal(model.features(video).pooled, module.pooled(video))
    assert model.predict(video, top=1).classes.shape == (2, 1)


@pytest.mark.parametrize("name", ["tiny", "classes", "captions"])
def test_saved_folders_come_back_bit_for_bit(name: str, tmp_path: Path, tiny_list: Path, words: Path) -> None:
    path, _ = saved(tmp_path, name)
    options = {"tokenizer": words} if name == "captions" else {}
    model = umt_fast.load_model(weights=path, device="cpu", **options)
    if name == "classes":  # as official files of 16 frames or 384 pixels have one
        model.network.position.add_(torch.randn_like(model.network.position))
    out = tmp_path / "out"
    model.save_pretrained(out)
    assert {"config.json", "model.safetensors", "README.md"} <= {file.name for file in out.iterdir()}
    assert json.loads((out / "config.json").read_text()).items() >= model.description.items()
    for again in (
        umt_fast.from_pretrained(out, device="cpu"),
        type(model).from_pretrained(out, device="cpu"),
        umt_fast.load_model(weights=out, device="cpu"),
        umt_fast.load_model(weights=out / "model.safetensors", device="cpu", **options),
    ):
        assert type(again) is type(model) and again.description == model.description
        assert again.fingerprint() == model.fingerprint()
        mine, other = model.state_dict(), again.state_dict()
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        assert torch.equal(model.features(paths_of(tiny_list)).pooled, again.features(paths_of(tiny_list)).pooled)
    if name == "captions":  # the tokenizer went along
        expected = model.encode_text(["a", "b c"])
        words.rename(tmp_path / "moved")
        assert torch.equal(umt_fast.from_pretrained(out, device="cpu").encode_text(["a", "b c"]), expected)
        with pytest.raises(ConfigError, match="is a VideoTextModel, no StudentModel"):
            umt_fast.StudentModel.from_pretrained(out)


def test_a_pushed_repository_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """push_to_hub as the mixin does it, with the upload and the download replaced by a folder."""
    import huggingface_hub
    from huggingface_hub import hub_mixin

    path, _ = saved(tmp_path, "tiny")
    model = umt_fast.load_model(weights=path, device="cpu")
    remote = tmp_path / "remote"

    class Api:
        def __init__(self, **options: object) -> None: ...

        def create_repo(self, repo_id: str, **options: object) -> object:
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, *, folder_path: str, **options: object) -> str:
            import shutil

            shutil.copytree(folder_path, remote)
            return "done"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    assert model.push_to_hub("somebody/tiny") == "done"
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda repo_id, filename, **options: str(remote / filename))
    monkeypatch.setattr("umt_fast.pretrained.base.snapshot_download", lambda repo_id, **options: str(remote))
    assert umt_fast.from_pretrained("somebody/tiny", device="cpu").fingerprint() == model.fingerprint()

    def gone(*names: object, **options: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no such thing")

    monkeypatch.setattr(hub_mixin, "hf_hub_download", gone)
    with pytest.raises(WeightsError, match="no model can be had from somebody/else.*no such thing"):
        umt_fast.from_pretrained("somebody/else")


def test_checkpoints_of_runs(tmp_path: Path, tiny_list: Path, words: Path) -> None:
    """A run's own file, with the optimizer beside the weights; one that carries only the older record; the run's tokenizer."""
    out = tmp_path / "run"
    command = ["train", f"{TINY}:tiny", "--data.train", str(tiny_list), "--run.out", str(out), "--run.max_steps", "1"]
    assert main(command) == 0
    checkpoint = out / "checkpoint-00000001.pt"
    model = umt_fast.load_model(weights=checkpoint, device="cpu")
    content = torch.load(checkpoint, weights_only=True)
    student, described = trained("tiny")
    student.load_state_dict(content["model"])
    video = batch_of(tiny_list, "sparse", "center")
    with torch.no_grad():
        assert torch.equal(model.features(video).tokens.flatten(1, 3), student.encoder.norm(student.encoder(video)[0]))
    del content["model_config"]
    torch.save(content, tmp_path / "older.pt")
    older = umt_fast.load_model(weights=tmp_path / "older.pt", device="cpu")
    assert older.fingerprint() == model.fingerprint() and older.vit.grid == model.vit.grid

    module, described = trained("captions")
    content = {"model": module.state_dict(), "model_config": described, "config": {"tokenizer": str(words)}}
    torch.save(content, tmp_path / "stage2.pt")
    assert umt_fast.load_model(weights=tmp_path / "stage2.pt", device="cpu").encode_text(["a b"]).shape == (1, 8)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the official names mean the tiny sizes, so that official layouts can be had small."""
    from umt_fast.models import description

    tower = {"width": 32, "depth": 2, "num_heads": 2}
    for name in ("b16", "l16"):
        monkeypatch.setitem(description.STUDENTS, name, tower)
    text = {"width": 32, "depth": 2, "fusion_layer": 1, "num_heads": 2, "vocab_size": None, "max_positions": None}
    monkeypatch.setitem(MODELS, "umt_b16", lambda: {**description._video_text("b16"), "text": dict(text)})
    monkeypatch.setitem(MODELS, "umt_b16_ret", lambda: {**description._retrieval("b16"), "text": dict(text)})


@torch.no_grad()
def test_official_files(tmp_path: Path, tiny_list: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat and wrapped, with DDP's prefix, the teacher and settings beside them; stages 1 and 2, downstream, classifiers."""
    shrink(monkeypatch)
    sizes = {"num_frames": 4, "image_size": 32}
    video = batch_of(tiny_list, "sparse", "center")
    student, _ = trained("tiny")
    torch.save(student.state_dict(), tmp_path / "b16_ptk710_f8_res224.pth")
    model = umt_fast.load_model("umt_b16_stage1", weights=tmp_path / "b16_ptk710_f8_res224.pth", device="cpu", **sizes)
    assert torch.equal(model.features(video).tokens.flatten(1, 3), student.encoder.norm(student.encoder(video)[0]))
    assert model.description["num_layers"] == 2 and model.description["output_dim"] == 16

    module, _ = trained("captions")
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    torch.save({"model": state | {"module.clip_teacher.proj": torch.ones(2)}, "epoch": 9}, tmp_path / "b16_25m.pth")
    model = umt_fast.load_model("umt_b16", weights=tmp_path / "b16_25m.pth", device="cpu", **sizes)
    assert model.words.name == "bert-base-uncased"
    tokens, _ = module.vision_encoder.embed(video)
    assert torch.equal(model.features(video).tokens.flatten(1, 3), tokens)
    downstream = {
        key.replace("text_encoder.bert.", "text_encoder."): value
        for key, value in module.state_dict().items()
        if not key.startswith(("text_encoder.cls.", "vision_encoder.clip_decoder."))
    }
    torch.save({"model": downstream}, tmp_path / "ret.pth")
    model = umt_fast.load_model("ret_msrvtt_b16_25m", weights=tmp_path / "ret.pth", device="cpu", image_size=32)
    assert model.vit.num_frames == 12 and isinstance(model, umt_fast.TunedVideoTextModel)
    model = umt_fast.load_model("umt_b16_ret", weights=tmp_path / "ret.pth", device="cpu", **sizes)
    assert torch.equal(model.features(video).tokens.flatten(1, 3), tokens)
    # Out in the official layout, and in again.
    model.save_pretrained(tmp_path / "folder")
    again = umt_fast.from_pretrained(tmp_path / "folder", device="cpu")
    assert torch.equal(again.features(video).tokens, model.features(video).tokens)
    assert load_state(tmp_path / "folder" / "model.safetensors").keys() >= downstream.keys()
    model = umt_fast.load_model("umt_b16", weights=tmp_path / "ret.pth", device="cpu", **sizes)
    assert torch.equal(model.features(video).tokens.flatten(1, 3), tokens)

    classifier, _ = trained("classes")
    torch.save({"module": classifier.state_dict()}, tmp_path / "ft.pth")
    model = umt_fast.load_model("umt_l16_ft", weights=tmp_path / "ft.pth", device="cpu", **sizes)
    wanted = Classifier(model.vit, 2).eval()  # the official table, resized
    wanted.load_state_dict(classifier.state_dict())
    assert torch.equal(model.logits(video), wanted(video))


def test_bf16_is_another_computation(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "tiny")
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    exact = umt_fast.load_model(weights=path, device="cpu").features(frames).pooled
    rough = umt_fast.load_model(weights=path, device="cpu", dtype=torch.bfloat16).features(frames).pooled
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.05, rtol=0.05)


def test_released_files_are_fetched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    shrink(monkeypatch)
    student, _ = trained("tiny")
    torch.save(student.state_dict(), tmp_path / "b16_ptk710_f8_res224.pth")
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / Path(file).name)

    cache = tmp_path / "cache"

    def cached(name: str, *, local_files_only: bool) -> str:
        assert name == "OpenGVLab/UMT" and local_files_only
        if not cache.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing yet")
        return str(cache)

    files = [SimpleNamespace(rfilename=name) for name in ("README.md", "a/b16_ptk710_f8_res224.pth")]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, **options: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = umt_fast.load_model("b16_ptk710_f8_res224", device="cpu", image_size=32)
    assert asked == [("OpenGVLab/UMT", "a/b16_ptk710_f8_res224.pth")] and model.vit.num_frames == 8
    again = umt_fast.load_model("umt_b16_stage1", weights="b16_ptk710_f8_res224", device="cpu", image_size=32)
    assert again.fingerprint() == model.fingerprint()
    with pytest.raises(WeightsError, match="OpenGVLab/UMT on Hugging Face has no l16_25m.pth"):
        umt_fast.load_model("l16_25m")

    class Offline(Exception):  # of the client's HTTP library; no OSError
        pass

    def refuse(name: str, **options: object) -> None:
        raise Offline("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    with pytest.raises(
        WeightsError, match="not be fetched .Offline.: .* OpenGVLab/UMT .* fetch l16_25m.pth there by hand"
    ):
        umt_fast.load_model("l16_25m")
    # What was fetched before needs no network.
    (cache / "b").mkdir(parents=True)
    (tmp_path / "b16_ptk710_f8_res224.pth").rename(cache / "b" / "b16_ptk710_f8_res224.pth")
    cached_model = umt_fast.load_model("b16_ptk710_f8_res224", device="cpu", image_size=32)
    assert cached_model.fingerprint() == model.fingerprint()
