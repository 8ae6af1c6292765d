"""Question answering from lists to files: what is read, trained, saved, judged, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import umt_fast
from tests.assets import tiny
from umt_fast.__main__ import main
from umt_fast.config import ConfigError, QuestionConfig
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.questions import AnswerTokens, QuestionTokens
from umt_fast.data.loaders.tokens import load_tokenizer
from umt_fast.data.sources.questions import read_answers, read_questions
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.tune_measure import difference, observe
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.weights import WeightsError, save_state
from umt_fast.plan import work_of
from umt_fast.tasks import answering, task_named, tuning
from umt_fast.train import train

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "what",
    "is",
    "it",
    "a",
    "red",
    "blue",
    "thing",
    "ball",
    "how",
    "many",
]
ONE = Ranks(0, 1, torch.device("cpu"))
ENTRY = {"video": "video0.mp4", "question": "What is it?", "answer": "a red ball"}


@pytest.fixture
def world(tiny_list: Path) -> Path:
    """A folder with two videos, a vocabulary, a list of four questions and one of three answers."""
    folder = tiny_list.parent
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    written(
        folder / "train.json",
        [
            ENTRY,
            ENTRY | {"answer": ["blue", "red", "red"]},
            {"video": "video1.mp4", "question": "how many, red?", "answer": "a", "question_id": "v1_q", "type": 7},
            {"video": "video1.mp4", "question": "what is a red thing", "answer": "ball", "type": 4},
        ],
    )
    written(folder / "answers.json", ["a", "ball", "red", "a red ball"])
    return folder


def written(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries))
    return path


def configured(folder: Path, **changes: object) -> QuestionConfig:
    base = tiny.captions()
    base.run.out, base.run.max_steps = str(folder / "run"), 3
    base.data.sampling, base.data.augment = "intervals", "random_resized_crop"
    settings = {"questions": (str(folder / "train.json"),), "tokenizer": str(folder), "max_length": 6, "max_answer": 4}
    return QuestionConfig(run=base.run, data=base.data, student=base.student, text=base.text, **(settings | changes))


def test_a_list_of_questions(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Questions are cleaned, answers are not; weights are shares; a clip with several questions has as many rows."""
    entries = json.loads((world / "train.json").read_text())
    written(world / "more.json", [*entries, ENTRY | {"question": "?!"}])
    with caplog.at_level(logging.WARNING):
        found = read_questions([str(world / "more.json")], train=True)
    assert "left out 1 questions without any word" in caplog.text
    assert list(found.questions) == ["what is it", "what is it", "how many red", "what is a red thing"]
    assert [found.answers_of(row) for row in range(4)] == [["a red ball"], ["blue", "red"], ["a"], ["ball"]]
    assert found.weights.tolist() == pytest.approx([1, 1 / 3, 2 / 3, 1, 1]) and found.most_answers == 2
    assert list(found.names) == ["0", "1", "v1_q", "3"] and list(found.kinds) == ["", "", "7", "4"]
    assert [Path(clip.path).name for clip in found.clips] == ["video0.mp4"] * 2 + ["video1.mp4"] * 2
    assert len(read_questions([str(world / "more.json")], train=False)) == 5
    (world / "lists").mkdir()
    moved = written(world / "lists" / "train.json", entries)
    assert len(read_questions([f"{moved}={world}", str(world / "train.json")], train=False)) == 8


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"question": "what", "answer": "a"}, 'entry 1 has no "video" or "image"'),
        (ENTRY | {"video": ""}, '"video" is empty; it must name a file'),
        (ENTRY | {"video": ["a", "b"]}, '"video" is .*; it must be a text'),
        ({"video": "video0.mp4", "answer": "a"}, 'entry 1 has no "question"'),
        (ENTRY | {"question": 5}, '"question" is 5; it must be a text'),
        ({"video": "video0.mp4", "question": "what"}, 'entry 1 has no "answer"'),
        (ENTRY | {"answer": []}, '"answer" is .*; it must be a text or a list of at least one'),
        (ENTRY | {"answer": ["a", 3]}, '"answer" is .*; it must be a text or a list of at least one'),
        (ENTRY | {"answer": " "}, "the answer ' ' has no character"),
        ("what", 'it is "what"; expected'),
    ],
)
def test_entries_that_are_no_questions(entry: object, message: str, world: Path) -> None:
    path = written(world / "bad.json", [ENTRY, entry])
    with pytest.raises(DataError, match=message):
        read_questions([str(path)], train=True)


def test_lists_that_cannot_be_used(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="holds no questions"):
        read_questions([str(written(world / "none.json", []))], train=True)
    with pytest.raises(DataError, match="1 of the 2 files of .* are not there, the first: .*gone.mp4"):
        read_questions([str(written(world / "gone.json", [ENTRY, ENTRY | {"video": "gone.mp4"}]))], train=False)
    with pytest.raises(DataError, match="holds no answers"):
        read_answers(written(world / "none.json", []))
    with pytest.raises(DataError, match="entry 1: it is 3; an answer must be a text"):
        read_answers(written(world / "three.json", ["a", 3]))
    with pytest.raises(DataError, match="no list of answers at .*; give a .json list of texts"):
        read_answers(world / "missing.json")
    with caplog.at_level(logging.WARNING):
        assert read_answers(written(world / "twice.json", ["red", "a", "red"])) == ["red", "a"]
    assert "1 answers are there more than once" in caplog.text


def test_rows_of_answers_have_one_shape(world: Path) -> None:
    """Two rows a question; of more answers the most frequent stay; empty rows weigh nothing."""
    questions, words = read_questions([str(world / "train.json")], train=True), load_tokenizer(str(world))

    def columns(rows: int, chosen: list[int], fixed: bool = False) -> dict[str, Tensor]:
        tokens = QuestionTokens(questions, words, max_length=6, max_answer=4, rows=rows, fixed=fixed)
        return tokens.columns(torch.tensor(chosen))

    found = columns(2, [0, 1])
    assert found["answer_weights"].tolist() == [[1, 0], [pytest.approx(1 / 3), pytest.approx(2 / 3)]]
    # "a red ball [SEP]" is cut to the class token and three words, and loses its end.
    assert found["answer_ids"].tolist() == [[[2, 8, 9, 12], [0] * 4], [[2, 10, 3, 0], [2, 9, 3, 0]]]
    assert found["answer_mask"].sum(2).tolist() == [[4, 0], [3, 3]]
    assert found["ids"].tolist() == [[2, 5, 6, 7]] * 2 and found["mask"].all()
    kept = columns(1, [1])
    assert kept["answer_ids"].tolist() == [[[2, 9, 3]]] and kept["answer_weights"].tolist() == [[pytest.approx(2 / 3)]]
    for chosen in ([0, 1], [2, 2]):
        fixed = columns(3, chosen, fixed=True)
        assert fixed["ids"].shape == (2, 6) and fixed["answer_ids"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match="max_length is 1"):
        AnswerTokens(["a"], words, max_length=1)


def test_repeated_crops_keep_their_questions(world: Path) -> None:
    config = configured(world)
    config.data.num_sample = 2
    batch = next(iter(task_named("question_answering").loader(config, ONE)))
    assert batch["video"].shape[0] == 4 == len(batch["ids"]) and batch["answer_ids"].shape[:2] == (4, 2)
    assert torch.equal(batch["answer_ids"][0], batch["answer_ids"][1])


def test_it_trains_continues_and_is_used(world: Path) -> None:
    """Training lowers the loss; converted weights are the official layout, and the Python API answers with them."""
    config = configured(world)
    config.run.max_steps, config.run.epochs, config.run.warmup_epochs, config.run.log_every = 60, 30, 1, 20
    config.optim.lr, config.student.drop_path, config.text.init_std = 1e-2, 0.0, 0.1
    config.text.hidden_dropout = config.text.attention_dropout = 0.0
    folder = train(config)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    newest = max(folder.glob("checkpoint-*.pt"))
    assert main(["convert", str(newest), str(world / "qa.safetensors")]) == 0
    model = umt_fast.load_model(weights=world / "qa.safetensors", tokenizer=world)
    assert isinstance(model, umt_fast.QuestionAnsweringModel)
    state = torch.load(newest, weights_only=True)["model"]
    assert "text_decoder.bert.embeddings.word_embeddings.weight" in state and "temp" not in state
    clip, answers = str(world / "video1.mp4"), ["a", "ball", "red", "ball"]
    (one,) = model.answer(clip, "what is a red thing?", answers)
    assert [answer.text for answer in one][0] == "ball" and sum(answer.probability for answer in one) == pytest.approx(
        1
    )
    many = model.answer(clip, ["how many red", "what is a red thing"], answers, top=1)
    assert [answer.text for (answer,) in many] == ["a", "ball"]
    both = model.answer([str(world / "video0.mp4"), clip], "what is it", answers, rule="chain", top_k=2)
    assert [len(found) for found in both] == [2, 2]
    assert model.answer_freely(clip, ["how many red", "what is a red thing"]) == ["a", "ball"]
    model.save_pretrained(world / "saved")
    again = umt_fast.from_pretrained(world / "saved")
    assert again.answer_freely(clip, "how many red") == ["a"]
    assert model.features(clip).pooled.shape == (1, 32)
    for question, options, error in (
        ("?", answers, "has no word"),
        (["a", "b"], answers, "2 questions to 0 clips"),
        ("what", [], "give a list of at least one text"),
        ("what", "ball", "give a list of at least one text"),
        ("what", ["ball", 3], "answers holds 3; give texts"),
        (5, answers, "questions are 5, of type int"),
        (["what", 5, "is"], answers, "question 1 is 5, of type int"),
    ):
        with pytest.raises(DataError, match=error if question != ["a", "b"] else "2 questions to 3 clips"):
            model.answer([clip] * 3, question, options)
    with pytest.raises(ConfigError, match="top is 0"):
        model.answer(clip, "what", answers, top=0)


def trained(world: Path, **changes: object) -> Path:
    """The checkpoint of a run of three steps."""
    return max(train(configured(world, **changes)).glob("checkpoint-0*.pt"))


def judge(capsys: pytest.CaptureFixture, *arguments: object, code: int = 0) -> dict | str:
    """The figures of `eval answer`, or the one line in which it fails."""
    capsys.readouterr()
    command = ["eval", "answer", *map(str, arguments), "--device", "cpu", "--workers", "0"]
    assert main(command) == code
    said = capsys.readouterr()
    if code == 0:
        return json.loads(said.out)
    assert "Traceback" not in said.err and said.err.count("umt_fast: error: ") == 1
    return said.err.splitlines()[-1]


def test_eval_answers_a_list(world: Path, capsys: pytest.CaptureFixture) -> None:
    """Every way to answer, against the model's own answer to each question; types; what is not in the list is counted."""
    checkpoint = trained(world)
    entries = json.loads((world / "train.json").read_text())
    written(
        world / "test.json", [*entries, ENTRY | {"question": "how many a what is it thing", "answer": "blue thing"}]
    )
    asked, listed = world / "test.json", world / "answers.json"
    model = umt_fast.load_model(weights=checkpoint, tokenizer=world, device="cpu")
    answers, seen = read_answers(listed), []
    for options, expected in (
        (("--answers", listed), {"rule": "official"}),
        (("--answers", listed, "--rule", "chain", "--top_k", 2), {"rule": "chain", "top_k": 2}),
        (("--free",), None),
    ):
        figures = judge(capsys, checkpoint, asked, "--scores", world / "scores.json", "--batch_size", 1, *options)
        rows = json.loads((world / "scores.json").read_text())["questions"]
        assert [row["question_id"] for row in rows] == ["0", "1", "v1_q", "3", "4"]
        assert figures["accuracy"] == sum(row["right"] for row in rows) / 5
        assert figures["accuracy_7"] == rows[2]["right"] and figures["accuracy_4"] == rows[3]["right"]
        assert (figures["questions"], figures["clips"], figures["cut"]) == (5, 2, 1)
        assert figures.get("answerable") == (None if expected is None else 0.8)
        seen.append([row["found"] for row in rows])
        for row in rows:
            if expected is None:
                assert row["answer"] == model.answer_freely(row["clip"], row["question"])[0] and row["found"] == []
                continue
            (own,) = model.answer(row["clip"], row["question"], answers, top=10, **expected)
            assert row["found"] == [[answer.text, pytest.approx(answer.probability, abs=1e-4)] for answer in own]
            assert row["right"] == (row["answer"] in row["expected"])
    official, chain, _ = seen
    assert [len(found) for found in official] == [4] * 5 and [len(found) for found in chain] == [2] * 5
    # Two candidates' odds: the first word counts once in place of twice.
    (best, share), (_, other) = chain[0]
    assert share / other != pytest.approx(dict(official[0])[best] / dict(official[0])[chain[0][1][0]], rel=1e-3)
    (world / "moved").mkdir()
    asked.rename(world / "moved" / "test.json")
    assert judge(capsys, checkpoint, world / "moved" / "test.json", "--root", world, "--free") == figures


def test_eval_refuses_in_one_line(world: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint, asked, listed = trained(world), world / "train.json", ("--answers", world / "answers.json")
    none = written(world / "none.json", [])
    gone = written(world / "gone.json", [ENTRY | {"video": "gone.mp4"}])
    clipless = written(world / "clipless.json", [{"question": "what", "answer": "a"}])
    for arguments, message in (
        ((asked,), "answers is empty; give the list to choose from, or --free"),
        ((asked, "--answers", none), "holds no answers; give a list of at least one text"),
        ((none, *listed), "holds no questions"),
        ((gone, *listed), "1 of the 1 files of"),
        ((clipless, *listed), 'entry 0 has no "video" or "image"'),
        ((asked, *listed, "--free"), "--answers is for answers that are chosen"),
        ((asked, "--free", "--rule", "chain"), "--rule is for answers that are chosen"),
        ((asked, *listed, "--top_k", "0"), "top_k is 0"),
        ((asked, *listed, "--max_answer", "1"), "max_answer is 1; it must lie in [2, 8]"),
        ((asked, *listed, "--max_length", "99"), "max_length is 99; it must lie in [2, 8]"),
        ((world / "video0.mp4", *listed), "is not JSON"),
    ):
        assert message in judge(capsys, checkpoint, *arguments, code=2)
    (world / "video1.mp4").write_bytes(b"no video")
    assert "video1.mp4" in judge(capsys, checkpoint, asked, *listed, code=2)


def test_an_official_file_is_judged_when_its_model_is_named(world: Path, capsys: pytest.CaptureFixture) -> None:
    """Flat, or under `model` with the settings of a run beside it; the recipe says what it is of."""
    checkpoint, listed = trained(world), ("--answers", world / "answers.json", "--tokenizer", world)
    expected = judge(capsys, checkpoint, world / "train.json", *listed)
    state = torch.load(checkpoint, weights_only=True)["model"]
    torch.save({"model": state, "epoch": 3}, world / "official.pth")
    page = world / "page.py"
    page.write_text(
        "from pathlib import Path\n"
        "from tests.tasks.test_question_answering import configured\n"
        f"def qa():\n    return configured(Path({str(world)!r}))\n"
    )
    arguments = (world / "official.pth", world / "train.json", *listed)
    assert judge(capsys, *arguments, "--model", f"{page}:qa") == expected
    assert "does not say which model it is of" in judge(capsys, *arguments, code=2)


def test_the_best_epoch_is_kept(world: Path, capsys: pytest.CaptureFixture) -> None:
    """Judged between epochs on a list whose clips the ranks share; the best file holds the best figure's weights."""
    config = configured(world, answers=str(world / "answers.json"))
    config.data.validation = str(world / "train.json")
    config.run.max_steps, config.run.epochs, config.run.dtype = 6, 3, "bf16"
    folder = train(config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "val_accuracy" in row]
    assert [row["step"] for row in judged] == [2, 4, 6] and all("val_accuracy_4" in row for row in judged)
    best = torch.load(folder / "checkpoint-best.pt", weights_only=True)
    assert best["validation"]["figures"]["accuracy"] == max(row["val_accuracy"] for row in judged)
    assert umt_fast.load_model(weights=folder / "checkpoint-best.pt").description["task"] == "question_answering"
    judged = judge(capsys, folder / "checkpoint-best.pt", world / "train.json", "--answers", config.answers)
    assert {key: value for key, value in judged.items() if key.startswith("accuracy")} == best["validation"]["figures"]
    config.answers, config.run.out = "", str(world / "other")
    with pytest.raises(ConfigError, match="answers is empty; give the list of answers to choose from"):
        train(config)
    config.data.validation, config.answers = "", str(world / "answers.json")
    with pytest.raises(ConfigError, match="answers is .*, but nothing is judged during training"):
        train(config)


def test_a_clip_that_cannot_be_read_is_replaced_with_its_question(world: Path) -> None:
    """In training: the row of the batch is another question of the list altogether, and the file is counted."""
    (world / "video0.mp4").write_bytes(b"no video")
    config = configured(world)
    config.data.max_bad_share = 1.0
    loader = task_named("question_answering").loader(config, ONE)
    questions = read_questions(config.questions, train=True)
    for batch in loader:
        for row, number in enumerate(batch["index"].tolist()):
            assert Path(questions.clips[number].path).name == "video1.mp4"
            expected = load_tokenizer(str(world))(questions.questions[number]).input_ids[:-1][:6]
            assert batch["ids"][row, batch["mask"][row]].tolist() == expected
    assert len(loader.bad_files) == 1


def test_it_is_planned_tuned_and_checked(world: Path) -> None:
    task, config = task_named("question_answering"), configured(world)
    settled = task.settled(config)
    assert (config.answer_rows, settled.answer_rows) == (0, 2)
    assert task.clips_of_epoch(config) == (4, f"questions of {config.questions[0]}")
    assert task.clips_of_epoch(configured(world, questions=())) is None
    record = umt_fast.config.to_dict(settled)
    one, other = (tuning.build_case("question_answering", record, exact=True) for _ in range(2))
    assert one.batches[0]["answer_ids"].shape == (2, 2, 4)
    assert not difference(observe(one), observe(other), "fp32")
    work, single = work_of(settled), work_of(configured(world))
    assert work.trained == single.trained and work.flops > single.flops
    for name, value, message in (
        ("data.train", "list.csv", "give them with --questions"),
        ("data.root", "/data", "give LIST=FOLDER"),
    ):
        wrong = configured(world)
        setattr(wrong.data, name.split(".")[1], value)
        with pytest.raises(ConfigError, match=f"{name} is .*{message}"):
            train(wrong)
    with pytest.raises(ConfigError, match="questions is empty"):
        train(configured(world, questions=()))
    with pytest.raises(ConfigError, match="text.vocab_size is 16, but the tokenizer .* has 25 words"):
        (world / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(10))]))
        train(configured(world))
    for change, message in (({"max_answer": 1}, "max_answer is 1"), ({"max_length": 99}, "max_length is 99")):
        with pytest.raises(ConfigError, match=message):
            configured(world, **change)
    with pytest.raises(ConfigError, match="answer_rows is -1"):
        configured(world, answer_rows=-1)


def model_of(folder: Path) -> QuestionModel:
    torch.manual_seed(0)
    config = configured(folder)
    config.student.drop_path = 0.0
    return QuestionModel(config.student, config.text).eval()


def test_written_answers_are_judged_by_their_words(world: Path) -> None:
    """As an answer reads in training: one that is too long is right when its beginning is."""
    questions, words = read_questions([str(world / "train.json")], train=False), load_tokenizer(str(world))
    tokens = AnswerTokens(questions.answers, words, max_length=4)
    written_words = [[8, 9, 12], [9, 3], [8, 9, 3], [12, 3]]
    predictions = [answering.Prediction(["?"], [], words) for words in written_words]
    assert answering.right_rows(questions, predictions, tokens) == [True, True, False, True]
    figures = answering.shares_of(questions, [True, True, False, True])
    assert figures == {"accuracy": 0.75, "accuracy_4": 1.0, "accuracy_7": 0.0}


def test_retrieval_weights_and_answers_are_told_apart(world: Path) -> None:
    save_state(model_of(world).state_dict(), world / "official.safetensors")
    with pytest.raises(WeightsError, match="does not say which model it is of"):
        umt_fast.load_model(weights=world / "official.safetensors")
    with pytest.raises(WeightsError, match="holds question-answering weights .*'umt_b16' is of stage-2 or downstream"):
        umt_fast.load_model("umt_b16", weights=world / "official.safetensors")
    model = umt_fast.load_model("umt_b16_qa", weights="untrained", num_frames=2, image_size=32)
    assert model.network.text_decoder.config.vocab_size == 30522 and model.description["max_answer"] == 5


def test_what_the_words_and_the_list_lack_is_counted(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = [
        ENTRY | {"question": "is it zebra"},
        ENTRY | {"question": "is it a yak", "answer": ["okapi", "red"]},
        ENTRY | {"answer": "green"},
    ]
    lists = {"questions": (str(written(world / "odd.json", entries)),), "answers": str(world / "answers.json")}
    config = configured(world, **lists)
    config.data.validation, config.run.validate_epochs = lists["questions"][0], 1
    config.run.batch_size, config.run.max_steps = 1, 1
    caplog.set_level("INFO")
    train(config)
    counted = (
        r"2 of 3 questions and 2 of 4 answers have words that the tokenizer does not know; each is read as \[UNK\]"
    )
    assert re.search(counted, caplog.text), caplog.text
    assert re.search(r"1 of the 3 questions of .*odd.json have no answer in .*answers.json", caplog.text)
    newest = max((world / "run").glob("checkpoint-0*.pt"))
    caplog.clear()
    judge = ["eval", "answer", str(newest), lists["questions"][0], "--answers", lists["answers"], "--device", "cpu"]
    assert main([*judge, "--workers", "0"]) == 0
    assert "2 of 3 questions and 0 of 4 answers to choose from have words that the tokenizer" in caplog.text
    caplog.clear()
    assert main([*judge[:3], str(world / "train.json"), *judge[4:], "--workers", "0"]) == 0
    assert "have words that the tokenizer" not in caplog.text


def test_every_entry_counts_and_any_of_its_answers_is_right(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the official figure keeps the last entry of an id, and takes lists of answers for wrong: 0 of 2 here."""
    entries = [
        ENTRY | {"question_id": 1, "answer": ["red", "ball"]},
        ENTRY | {"question_id": 1, "answer": "a"},
        ENTRY | {"question_id": 2, "answer": ["ball"]},
    ]
    questions = read_questions([str(written(world / "odd.json", entries))], train=False)
    predictions = [answering.Prediction(["ball"], [1.0])] * 3
    right = answering.right_rows(questions, predictions, None)
    assert right == [True, False, True] and answering.shares_of(questions, right)["accuracy"] == pytest.approx(2 / 3)
    file = trained(world)
    answers = ["--answers", str(world / "answers.json"), "--device", "cpu", "--workers", "0"]
    assert main(["eval", "answer", str(file), str(world / "odd.json"), *answers]) == 0
    assert "1 of 3 questions have the question_id of another one" in caplog.text
