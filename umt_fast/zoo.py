"""The official model zoo as data: every file its authors released, what it is of, and the score they published.

Needs no torch. `docs/zoo.md` is this table (`python -m umt_fast.zoo` prints it). The authors moved the files to a gated
repository of Hugging Face, REPOSITORY, in 2024; the links of the official MODEL_ZOO pages are dead since.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from umt_fast.config import ConfigError

REPOSITORY = "OpenGVLab/UMT"
"""Repository on Hugging Face. Whoever downloads has to accept its terms there and be logged in (`hf auth login`)."""

ARCHITECTURES: dict[str, str] = {
    "umt_b16": "stage 2, ViT-B/16 and BERT base: clips, texts, their similarity",
    "umt_l16": "stage 2, ViT-L/16 and BERT large: clips, texts, their similarity",
    "umt_b16_qa": "question answering, ViT-B/16 and BERT base: answers to questions about clips",
    "umt_l16_qa": "question answering, ViT-L/16 and BERT large: answers to questions about clips",
    "umt_b16_stage1": "stage 1, ViT-B/16: features of clips",
    "umt_l16_stage1": "stage 1, ViT-L/16: features of clips",
    "umt_b16_ft": "classifier, ViT-B/16",
    "umt_l16_ft": "classifier, ViT-L/16",
    "umt_b16_ret": "stage 2 fine-tuned for retrieval, ViT-B/16 and BERT base: clips, texts, their similarity",
    "umt_l16_ret": "stage 2 fine-tuned for retrieval, ViT-L/16 and BERT large: clips, texts, their similarity",
    "umt_b16_ava": "action detector, ViT-B/16",
    "umt_l16_ava": "action detector, ViT-L/16",
}
"""What load_model builds, by name; models/description.py has their sizes."""


@dataclass(frozen=True, kw_only=True)
class ZooFile:
    """One released file."""

    name: str
    """Its name there, without `.pth`."""
    model: str
    """The architecture that load_model builds for it."""
    task: Literal["stage 1", "stage 2", "classification", "detection", "retrieval", "question answering"]
    data: str
    """What it was trained on last."""
    frames: int
    image_size: int = 224
    metric: str = ""
    score: float | None = None
    """In percent, as published; None: none was."""
    note: str = ""

    @property
    def file(self) -> str:
        return f"{self.name}.pth"


def _pretrained(size: str) -> ZooFile:
    return ZooFile(
        name=f"{size}_ptk710_f8_res224",
        model=f"umt_{size}_stage1",
        task="stage 1",
        data="Kinetics-710, 200 epochs",
        frames=8,
    )


def _classifier(
    size: str,
    way: str,
    data: str,
    score: float,
    *,
    frames: int = 8,
    image_size: int = 224,
    views: str = "4x3",
    note: str = "",
) -> ZooFile:
    return ZooFile(
        name=f"{size}_ptk710_ftk710_{way}f{frames}_res{image_size}",
        model=f"umt_{size}_ft",
        task="classification",
        data=data,
        frames=frames,
        image_size=image_size,
        metric=f"top-1, {views} views",
        score=score,
        note=note,
    )


def _detector(size: str, score: float) -> ZooFile:
    return ZooFile(
        name=f"{size}_ptk710_ftk710_ftava_f8_res224",
        model=f"umt_{size}_ava",
        task="detection",
        data="AVA 2.2",
        frames=8,
        metric="frame mAP at IoU 0.5",
        score=score,
    )


def _stage2(size: str, corpus: str, score: float) -> ZooFile:
    return ZooFile(
        name=f"{size}_{corpus.lower()}",
        model=f"umt_{size}",
        task="stage 2",
        data=f"{corpus} captions",
        frames=4,
        metric="zero-shot MSRVTT text-to-video R@1",
        score=score,
        note="holds the CLIP teacher too, which is not used",
    )


def _retrieval(size: str, name: str, data: str, score: float, note: str = "") -> ZooFile:
    return ZooFile(
        name=f"ret_{name}_{size}_25m",
        model=f"umt_{size}_ret",
        task="retrieval",
        data=data,
        frames=12,
        metric="text-to-video R@1",
        score=score,
        note=note,
    )


def _answers(size: str, name: str, data: str, score: float, note: str = "") -> ZooFile:
    return ZooFile(
        name=f"qa_{name}_{size}_25m",
        model=f"umt_{size}_qa",
        task="question answering",
        data=data,
        frames=12,
        metric="accuracy",
        score=score,
        note=note,
    )


_MISLABELED = "the official table calls it L/16"
_OTHER_LINK = "the official link leads to the B/16 file"
_SSV2 = "fine-tuned from stage 1 directly, whatever its name says; paper and script have 2x3 views"

ZOO: dict[str, ZooFile] = {
    entry.name: entry
    for entry in (
        _pretrained("b16"),
        _pretrained("l16"),
        _classifier("b16", "", "Kinetics-710", 81.9),
        _classifier("l16", "", "Kinetics-710", 86.0),
        _classifier("b16", "ftk400_", "Kinetics-400", 87.4),
        _classifier("l16", "ftk400_", "Kinetics-400", 90.3),
        _classifier("l16", "ftk400_", "Kinetics-400", 90.6, frames=16),
        _classifier("b16", "ftk600_", "Kinetics-600", 87.8),
        _classifier("l16", "ftk600_", "Kinetics-600", 90.4),
        _classifier("l16", "ftk600_", "Kinetics-600", 90.5, frames=16),
        _classifier("b16", "ftk700_", "Kinetics-700", 78.5),
        _classifier("l16", "ftk700_", "Kinetics-700", 83.2),
        _classifier("l16", "ftk700_", "Kinetics-700", 83.6, frames=16),
        _classifier("b16", "ftk400_ftmitv1_", "Moments in Time", 44.6),
        _classifier("b16", "ftk400_ftmitv1_", "Moments in Time", 45.5, image_size=384, note=_MISLABELED),
        _classifier("l16", "ftk400_ftmitv1_", "Moments in Time", 48.0),
        _classifier("l16", "ftk400_ftmitv1_", "Moments in Time", 48.7, image_size=384),
        _classifier("b16", "ftssv2_", "Something-Something V2", 70.8, note=_SSV2),
        _classifier("l16", "ftssv2_", "Something-Something V2", 74.7, note=_SSV2),
        _detector("b16", 33.5),
        _detector("l16", 39.8),
        _stage2("b16", "5M", 29.6),
        _stage2("b16", "17M", 35.5),
        _stage2("b16", "25M", 35.2),
        _stage2("l16", "5M", 33.3),
        _stage2("l16", "17M", 42.6),
        _stage2("l16", "25M", 40.7),
        _retrieval("b16", "msrvtt", "MSRVTT", 51.0),
        _retrieval("l16", "msrvtt", "MSRVTT", 58.8),
        _retrieval("b16", "didemo", "DiDeMo", 61.6),
        _retrieval("l16", "didemo", "DiDeMo", 70.4),
        _retrieval("b16", "anet", "ActivityNet", 58.3),
        _retrieval("l16", "anet", "ActivityNet", 66.8),
        _retrieval("b16", "lsmdc", "LSMDC", 32.7),
        _retrieval("l16", "lsmdc", "LSMDC", 43.0),
        _retrieval("b16", "msvd", "MSVD", 50.8, "the corrected score, lower than the paper's"),
        _retrieval("l16", "msvd", "MSVD", 58.2, "the corrected score, lower than the paper's"),
        _retrieval("b16", "ssv2_label", "SSV2-label", 64.2),
        _retrieval("l16", "ssv2_label", "SSV2-label", 73.3),
        _retrieval("b16", "ssv2_tpl", "SSV2-template", 87.9),
        _retrieval("l16", "ssv2_tpl", "SSV2-template", 90.8, _OTHER_LINK),
        _answers("b16", "anet", "ActivityNet-QA", 44.8),
        _answers("l16", "anet", "ActivityNet-QA", 47.9),
        _answers("b16", "msrvtt", "MSRVTT-QA", 44.9),
        _answers("l16", "msrvtt", "MSRVTT-QA", 47.1),
        _answers("b16", "msvd", "MSVD-QA", 49.5),
        _answers("l16", "msvd", "MSVD-QA", 55.2, _OTHER_LINK),
    )
}
"""The released files by name."""


def describe_file(entry: ZooFile) -> str:
    """A released file in one line."""
    score = "" if entry.score is None else f", {entry.score} {entry.metric}"
    clip = f"{entry.frames} frames of {entry.image_size} pixels"
    return f"official {entry.task} file, {entry.data}, {clip}{score}; load_model builds {entry.model}"


def list_models() -> dict[str, str]:
    """What load_model knows, by name, each with what it is in a line: architectures first, then released files."""
    return ARCHITECTURES | {name: describe_file(entry) for name, entry in ZOO.items()}


def require_known(name: str) -> None:
    """Raises ConfigError, with the nearest one, unless list_models has the name."""
    known = list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown model {name!r}{hint} There are {', '.join(ARCHITECTURES)}, and the released files of list_models()"
        )


def table() -> str:
    """The zoo as a Markdown page: docs/zoo.md."""
    lines = [
        "# The official model zoo",
        "",
        "Every file that the authors of Unmasked Teacher released, with the score they published. This page is made by",
        "`python -m umt_fast.zoo > docs/zoo.md`, and a test compares the two.",
        "",
        f"The files are in the repository `{REPOSITORY}` of Hugging Face. It is gated: accept its terms there and log in",
        '(`hf auth login`), then a name is enough: `umt_fast.load_model("b16_25m")`. Files that were fetched by hand need',
        'their path too: `umt_fast.load_model("b16_25m", weights="b16_25m.pth")`.',
        "",
        "| file (`.pth`) | model | task | trained on | frames | pixels | score, % | of what | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in ZOO.values():
        score = "" if entry.score is None else str(entry.score)
        cells = (
            entry.name,
            entry.model,
            entry.task,
            entry.data,
            entry.frames,
            entry.image_size,
            score,
            entry.metric,
            entry.note,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
