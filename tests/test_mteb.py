"""mteb's own tasks on tiny models and a few videos: the vectors are evaluation's, the scores follow from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import umt_fast
from tests.test_hub import WORDS, saved
from tests.videos import write_video
from umt_fast.config import ConfigError
from umt_fast.data.sources.clip import DataError

mteb = pytest.importorskip("mteb", reason="the benchmark is not installed: pip install 'umt_fast[mteb]'")
datasets = pytest.importorskip("datasets")

from mteb.abstasks.classification import AbsTaskClassification  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from umt_fast.mteb import MtebModel  # noqa: E402

TEXTS = ["a b", "c d e", "f", "g h i j"]


def about(name: str, kind: str, modalities: list[str], category: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        modalities=modalities,
        category=category,
        main_score=score,
        description="A few videos of a test.",
        reference=None,
        dataset={"path": "none", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Dark and bright videos with noise in turns; every frame differs."""
    folder, rng, paths = tmp_path_factory.mktemp("videos"), np.random.default_rng(0), []
    for number in range(12):
        pictures = (
            rng.integers(0, 60, (5, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1) + np.uint8(150 * (number % 2))
            for _ in range(12)
        )
        write_video(folder / f"{number}.mp4", pictures)
        paths.append(str(folder / f"{number}.mp4"))
    return paths


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


def reader(tmp_path: Path, words: Path) -> umt_fast.VideoTextModel:
    return umt_fast.load_model(weights=saved(tmp_path, "captions")[0], device="cpu", tokenizer=words)


def rows(videos: list, **columns: list) -> "datasets.Dataset":
    return datasets.Dataset.from_dict({"video": videos, **columns}).cast_column("video", datasets.Video())


class Brightness(AbsTaskClassification):
    metadata = about("Brightness", "VideoClassification", ["video"], "v2c", "accuracy")
    input_column_name, samples_per_label, n_experiments = "video", 4, 2
    videos: list[str] = []

    def load_data(self, **options: object) -> None:
        parts = {"train": self.videos[:8], "test": self.videos[8:]}
        self.dataset = datasets.DatasetDict(
            {name: rows(part, label=[number % 2 for number in range(len(part))]) for name, part in parts.items()}
        )
        self.data_loaded = True


class Found(AbsTaskRetrieval):
    metadata = about("Found", "Any2AnyRetrieval", ["text", "video"], "t2v", "ndcg_at_10")
    videos: list[str] = []
    right: list[int] = []

    def load_data(self, **options: object) -> None:
        count = len(TEXTS)
        names = [f"v{number}" for number in range(count)]
        queries = {"id": [f"q{number}" for number in range(count)], "text": TEXTS, "modality": ["text"] * count}
        corpus = rows(self.videos[:count], id=names, modality=["video"] * count)
        right = {f"q{number}": {names[clip]: 1} for number, clip in enumerate(self.right)}
        split = RetrievalSplitData(
            queries=datasets.Dataset.from_dict(queries), corpus=corpus, relevant_docs=right, top_ranked=None
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class Named(AbsTaskZeroShotClassification):
    metadata = about("Named", "VideoZeroshotClassification", ["video", "text"], "v2t", "accuracy")
    input_column_name = "video"
    videos: list[str] = []
    labels: list[int] = []

    def load_data(self, **options: object) -> None:
        self.dataset = datasets.DatasetDict({"test": rows(self.videos, label=self.labels)})
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        return TEXTS


def scores(model: MtebModel, task: object, videos: list[str]) -> dict:
    task.videos = videos
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 3})
    (found,) = result.task_results[0].scores["test"]
    return found


@pytest.mark.parametrize("name", ["tiny", "classes", "captions"])
def test_vectors_of_rows_are_evaluations(name: str, tmp_path: Path, videos: list[str]) -> None:
    """Of files and of bytes within the data set, in its order, whatever the batch."""
    model = umt_fast.load_model(weights=saved(tmp_path, name)[0], device="cpu")
    wanted = model.vectors(videos)["embedding" if name == "captions" else "pooled"]
    encoder = MtebModel(model)
    stored = [Path(path).read_bytes() for path in videos]
    for column in (videos, stored):
        loader = DataLoader(rows(column), batch_size=5)
        found = encoder.encode(loader, task_metadata=Brightness.metadata, hf_split="test", hf_subset="default")
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-6)
    assert encoder.mteb_model_meta.embed_dim == wanted.shape[1]


def test_classification_of_a_student(tmp_path: Path, videos: list[str]) -> None:
    encoder = MtebModel(umt_fast.load_model(weights=saved(tmp_path, "tiny")[0], device="cpu"), "somebody/tiny")
    assert scores(encoder, Brightness(), videos)["accuracy"] == 1.0
    assert scores(encoder, Brightness(), videos[::2] + videos[1::2])["accuracy"] < 1.0, "labels that mean nothing"
    assert encoder.mteb_model_meta.name == "somebody/tiny"


@torch.no_grad()
def test_retrieval_and_zero_shot_classes_of_stage_2(tmp_path: Path, videos: list[str], words: Path) -> None:
    """Three of four answers are made what the model itself finds best, the last one something else."""
    model = reader(tmp_path, words)
    for parameter in model.network.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    similarity = model.similarity(videos, TEXTS)
    found = MtebModel(model).similarity(model.encode_video(videos), model.encode_text(TEXTS))
    torch.testing.assert_close(torch.as_tensor(found), similarity)
    best = similarity[: len(TEXTS)].argmax(0).tolist()
    Found.right = [*best[:3], (best[3] + 1) % len(TEXTS)]
    assert scores(MtebModel(model), Found(), videos)["recall_at_1"] == 0.75
    classes = similarity.argmax(1)
    assert len(set(best)) > 1 and len(classes.unique()) > 1
    Named.labels = torch.where(torch.arange(len(videos)) % 4 < 3, classes, (classes + 1) % len(TEXTS)).tolist()
    assert scores(MtebModel(model), Named(), videos)["accuracy"] == 0.75


def test_what_a_model_has_not_is_refused(tmp_path: Path, videos: list[str], words: Path) -> None:
    model = umt_fast.load_model(weights=saved(tmp_path, "tiny")[0], device="cpu")
    with pytest.raises(ConfigError, match="vector is 'embedding', and a StudentModel has none"):
        MtebModel(model, vector="embedding")
    with pytest.raises(ConfigError, match="name is 'mine'; write it as ORGANIZATION/MODEL"):
        MtebModel(model, "mine")
    asked = {"task_metadata": Found.metadata, "hf_split": "test", "hf_subset": "default"}
    texts = DataLoader(datasets.Dataset.from_dict({"text": TEXTS}))
    with pytest.raises(ConfigError, match="Found has texts, and pooled vectors are of videos alone; give a stage-2"):
        MtebModel(model).encode(texts, **asked)
    with pytest.raises(ConfigError, match="give vector='embedding'"):
        MtebModel(reader(tmp_path, words), vector="pooled").encode(texts, **asked)
    for columns, said in (({"text": TEXTS[:1]}, "a video and a text together"), ({"audio": ["x"]}, "audio")):
        with pytest.raises(ConfigError, match=said):
            MtebModel(model).encode(DataLoader(rows(videos[:1], **columns)), **asked)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="bad.mp4"):
        MtebModel(model).encode(DataLoader(rows([str(tmp_path / "bad.mp4")])), **asked)
