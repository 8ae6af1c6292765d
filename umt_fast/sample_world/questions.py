"""Questions about the sample world's clips: what a single frame answers, and what only time does.

    python -m umt_fast.sample_world.questions runs/quickstart

goes on from a quickstart with `--stage2`: writes the lists, and fine-tunes the stage-2 model on clips, on their middle frame
alone, repeated, and on clips with questions about motion alone. Asks all of them about unseen clips, and prints the accuracy
of each type of question beside that of the most frequent answer. Settings: `questions` and `motion_questions` of
recipes/quickstart.py.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from umt_fast import recipe
from umt_fast.config import ConfigError, DataConfig, QuestionConfig
from umt_fast.data.decode.video import decode_frames
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.questions import read_answers, read_questions
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.precision import pick_device
from umt_fast.files import write_json
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.weights import load_question
from umt_fast.sample_world import world as sample_world
from umt_fast.sample_world.quickstart import Results, newest_weights
from umt_fast.tasks.answering import answer_list, chooser, right_rows, shares_of
from umt_fast.tasks.matching import whole_frames
from umt_fast.train import train

log = logging.getLogger("umt_fast")

MOTION = "motion"
KINDS = (MOTION, "color", "pattern", "background", "count")
# Questions of the training clips, drawn from KINDS for each; unseen clips are asked one of every kind.
EACH = 2
STARTS = {"still": "single frame", "clips": "clip", "motion": "asked of motion alone"}
"""The runs, by what the table calls them."""


def ask(scene: sample_world.Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question of a kind about a scene, and its answer."""
    things = (scene.thing, *scene.plain)
    if kind == MOTION:
        return f"which way does the {scene.pattern} thing move", scene.thing.direction
    if kind == "color":
        return f"what color is the {scene.pattern} thing", scene.thing.color
    if kind == "pattern":
        return "what pattern has the thing", scene.pattern
    if kind == "background":
        return "what is behind the things", scene.background
    present = rng.random() < 0.75  # else most answers would be 0
    color = str(rng.choice([thing.color for thing in things] if present else list(sample_world.COLORS)))
    return f"how many things are {color}", str(sum(thing.color == color for thing in things))


def questions_of(scene: sample_world.Scene, *, every: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer): of every kind, or of EACH different kinds; which ones, the scene's seed decides."""
    rng = np.random.default_rng((scene.seed, 1))
    for kind in KINDS if every else rng.choice(KINDS, EACH, replace=False).tolist():
        yield kind, *ask(scene, kind, rng)


def _clip_path(world: Path, name: str) -> str:
    return str((world / f"{name}.mp4").resolve())


def write_questions(world: Path, folder: Path) -> dict[str, Any]:
    """Writes train.json and test.json about clips, still_train.json and still_test.json about their middle frames (which go to
    stills/), motion_train.json about the motion of every clip, and answers.json."""
    answers: set[str] = set()
    motions = []
    counts = {}
    for split in ("train", "test"):
        (folder / "stills" / split).mkdir(parents=True, exist_ok=True)
        entries = []
        for number, scene in enumerate(sample_world.read_scenes(world, split)):
            name = f"{split}/{number:05d}"
            (frame,) = decode_frames(str(world / f"{name}.mp4"), lambda count: np.array([count // 2]))
            Image.fromarray(np.asarray(frame)).save(folder / "stills" / f"{name}.png")
            if split == "train":
                question, answer = ask(scene, MOTION, np.random.default_rng(0))
                motions.append(
                    {"video": _clip_path(world, name), "question": question, "answer": answer, "type": MOTION}
                )
            for kind, question, answer in questions_of(scene, every=split == "test"):
                entries.append((name, {"question": question, "answer": answer, "type": kind}))
                answers.add(answer)
        clips = [{"video": _clip_path(world, name)} | entry for name, entry in entries]
        write_json(folder / f"{split}.json", clips)
        write_json(folder / f"still_{split}.json", [{"image": f"stills/{name}.png"} | entry for name, entry in entries])
        counts[split] = len(entries)
    write_json(folder / "motion_train.json", motions)
    write_json(folder / "answers.json", sorted(answers))
    return counts


def write_vocabulary(before: Path, folder: Path) -> None:
    """The vocabulary of stage 2 with the new words of questions and answers behind it: known words keep their numbers."""
    known = (before / "vocab.txt").read_text().split("\n")[:-1]
    texts = [entry[key] for entry in json.loads((folder / "train.json").read_text()) for key in ("question", "answer")]
    new = sorted({word for text in texts for word in text.split()} - set(known))
    (folder / "vocab.txt").write_text("\n".join([*known, *new]) + "\n")


def prior(folder: Path) -> dict[str, float]:
    """The accuracy on unseen clips of the answer that is most frequent in training, by type of question and over all."""
    train_entries, test = (json.loads((folder / f"{split}.json").read_text()) for split in ("train", "test"))
    right: dict[str, list[bool]] = {}
    for kind in KINDS:
        (best, _), *_ = Counter(entry["answer"] for entry in train_entries if entry["type"] == kind).most_common(1)
        right[kind] = [entry["answer"] == best for entry in test if entry["type"] == kind]
    figures = {"accuracy": sum(map(sum, right.values())) / len(test)}
    return figures | {f"accuracy_{kind}": sum(its) / len(its) for kind, its in sorted(right.items())}


def config_of(out: Path, seed: int, start: str) -> QuestionConfig:
    """The page's run of a start: on clips, on single frames (`still`), or about `motion` alone."""
    folder = out / "questions"
    config: QuestionConfig = recipe.load(f"quickstart:{'motion_' if start == 'motion' else ''}questions")
    config.run.seed, config.run.out = seed, str(folder / f"run_{start}")
    config.questions = (str(folder / f"{'' if start == 'clips' else start + '_'}train.json"),)
    config.data.prepared = () if start == "still" else (str(out / "prepared" / "train_captions"),)
    config.init, config.tokenizer = newest_weights(out / "stage2"), str(folder)
    return config


def judged(config: QuestionConfig, folder: Path, start: str) -> dict[str, float]:
    """The accuracy of a run's last weights on unseen clips, or on single frames of them."""
    device = pick_device(config.run.device)
    model, words = QuestionModel(config.student, config.text), load_tokenizer(config.tokenizer)
    load_question(model, newest_weights(Path(config.run.out)))
    model.to(device).eval()
    questions = read_questions([str(folder / ("still_test.json" if start == "still" else "test.json"))], train=False)
    judge = chooser(model, read_answers(folder / "answers.json"), words, max_answer=config.max_answer)
    data = whole_frames(DataConfig(workers=config.data.workers))
    tokens = Tokens(questions.questions, words, max_length=config.max_length)
    predictions = answer_list(model, questions, tokens, judge, data, Ranks(0, 1, device), batch_size=32)
    return shares_of(questions, right_rows(questions, predictions, None))


def table(figures: dict[str, dict[str, float]]) -> str:
    """The accuracies side by side, in per cent; of a model that was asked of motion alone, these."""
    names = ["accuracy", *(f"accuracy_{kind}" for kind in KINDS)]
    lines = [f"{'':<12}" + "".join(f"{name:>22}" for name in figures)]
    for name in names:
        cells = ""
        for who, its in figures.items():
            asked = who != STARTS[MOTION] or name == f"accuracy_{MOTION}"
            cells += f"{f'{100 * its[name]:.1f}' if asked else '':>22}"
        lines.append(f"{name.removeprefix('accuracy_').replace('accuracy', 'all'):<12}{cells}")
    return "\n".join(lines)


def run(out: Path) -> dict[str, dict[str, float]]:
    """Does what is missing and returns the accuracies of the prior and of every run."""
    results, folder = Results(out), out / "questions"
    seed = results.seed
    if "stage2" not in results.values:
        raise ConfigError(f"{out} has no stage 2; run the quickstart with --stage2 --out {out} first")
    results.part("questions", lambda: write_questions(out / "world", folder))
    write_vocabulary(out / "tokenizer", folder)
    figures = {"most frequent answer": prior(folder)}
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    for start, name in STARTS.items():
        config = config_of(out, seed, start)
        results.part(f"questions on {start}", lambda config=config: {"run": str(train(config))})
        judge = results.part(
            f"answers on {start}", lambda config=config, start=start: dict(judged(config, folder, start))
        )
        figures[name] = judge
    return figures


def main(arguments: list[str]) -> int:
    """The command; see the module's head."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m umt_fast.sample_world.questions FOLDER\nFOLDER: of a quickstart with --stage2")
        return 0 if arguments else 2
    try:
        print(table(run(Path(arguments[0]))))
    except ConfigError as error:
        print(f"umt_fast: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
