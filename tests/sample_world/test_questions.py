"""Questions of the sample world: answers are the scenes' own, lists are what training reads, known words keep their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umt_fast.config import ConfigError
from umt_fast.data.sources.questions import read_answers, read_questions
from umt_fast.sample_world import questions
from umt_fast.sample_world import world as sample_world


def test_answers_are_the_scenes_own() -> None:
    for number in range(60):
        scene = sample_world.draw_scene(3, number)
        asked = {kind: (question, answer) for kind, question, answer in questions.questions_of(scene, every=True)}
        assert asked["motion"] == (f"which way does the {scene.pattern} thing move", scene.thing.direction)
        assert asked["color"][1] == scene.thing.color and asked["background"][1] == scene.background
        assert asked["pattern"] == ("what pattern has the thing", scene.pattern)
        color = asked["count"][0].removeprefix("how many things are ")
        assert asked["count"][1] == str([thing.color for thing in (scene.thing, *scene.plain)].count(color))
        few = list(questions.questions_of(scene, every=False))
        assert len({kind for kind, _, _ in few}) == questions.EACH == len(few)


def test_lists_and_words(tmp_path: Path) -> None:
    world = sample_world.build(tmp_path / "world", seed=1, train=6, test=3, labeled=2, workers=1)
    folder, before = tmp_path / "questions", tmp_path / "tokenizer"
    assert questions.write_questions(world, folder) == {"train": 12, "test": 15}
    clips, stills = (read_questions([str(folder / f"{name}test.json")], train=False) for name in ("", "still_"))
    assert list(clips.questions) == list(stills.questions) and list(clips.kinds) == list(questions.KINDS) * 3
    assert set(clips.answers) <= set(read_answers(folder / "answers.json"))
    with Image.open(stills.clips[0].path) as still:
        frame = sample_world.render(sample_world.read_scenes(world, "test")[0])[sample_world.FRAMES // 2]
        assert np.abs(np.asarray(still).astype(int) - frame).mean() < 12  # the same frame, but for compression
    motions = read_questions([str(folder / "motion_train.json")], train=True)
    directions = [scene.thing.direction for scene in sample_world.read_scenes(world, "train")]
    assert list(motions.answers) == directions and set(motions.kinds) == {"motion"}
    before.mkdir()
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "thing", "moves", "left"]
    (before / "vocab.txt").write_text("\n".join(known) + "\n")
    questions.write_vocabulary(before, folder)
    words = (folder / "vocab.txt").read_text().split()
    assert words[: len(known)] == known and len(set(words)) == len(words)
    texts = " ".join(entry["question"] for entry in json.loads((folder / "train.json").read_text()))
    assert set(texts.split()) <= set(words)


def test_the_most_frequent_answer_of_training_is_the_prior(tmp_path: Path) -> None:
    def entries(answers: dict[str, list[str]]) -> str:
        return json.dumps([{"type": kind, "answer": text} for kind, texts in answers.items() for text in texts])

    shared = {kind: ["a"] for kind in questions.KINDS if kind != "motion"}
    (tmp_path / "train.json").write_text(entries(shared | {"motion": ["left", "up", "up"]}))
    (tmp_path / "test.json").write_text(entries(shared | {"motion": ["up", "left", "left", "down"]}))
    found = questions.prior(tmp_path)
    assert found["accuracy_motion"] == 0.25 and found["accuracy_color"] == 1.0 and found["accuracy"] == 5 / 8


def test_a_model_asked_of_motion_alone_is_judged_by_motion_alone() -> None:
    figures = {"accuracy": 0.5} | {f"accuracy_{kind}": 0.25 for kind in questions.KINDS}
    lines = questions.table({"clip": figures, questions.STARTS["motion"]: figures}).splitlines()
    assert [line.split()[1:] for line in lines[1:3]] == [["50.0"], ["25.0", "25.0"]]
    assert lines[0].split()[0] == "clip" and all(line.split()[1:] == ["25.0"] for line in lines[3:])


def test_a_quickstart_without_stage_2_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match="has no stage 2; run the quickstart with --stage2"):
        questions.run(tmp_path)
    assert questions.main([str(tmp_path)]) == 2 and "has no stage 2" in capsys.readouterr().err
    assert questions.main([]) == 2 and questions.main(["--help"]) == 0
