"""Question answering against the official implementation: every `qa_*.safetensors` of parity_files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertTokenizerFast

from tests.downstream_cases import LIMIT, compare_gradients, sizes_of, state_of
from tests.parity_files import parity_files, read_case, relative
from umt_fast.data.loaders.questions import answer_tokens
from umt_fast.data.sources.questions import read_questions, weighted_answers
from umt_fast.engine.distributed import Ranks
from umt_fast.models.answer_decoder import AnswerList, prepare_answers
from umt_fast.models.attention import use_attention
from umt_fast.models.downstream import QuestionModel
from umt_fast.models.weights import fit
from umt_fast.tasks.answer_ranking import first_word_probabilities, rank_answers
from umt_fast.tasks.answering import Prediction, answer_batches, right_rows, shares_of, states_of_clips
from umt_fast.tasks.question_answering import QuestionTuning, answer_losses, question_states

CASES = parity_files("qa")
REPOSITORY = Path(__file__).resolve().parents[2]
_Case = tuple[dict, dict[str, Tensor], QuestionModel]


def load(path: Path) -> _Case:
    config, tensors = read_case(path)
    vit, text = sizes_of(config, tensors)
    model = QuestionModel(vit, text).eval()
    fit(model, state_of(tensors, model), str(path))
    return config, tensors, model


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> _Case:
    return load(request.param)


def states_of(case: _Case) -> tuple[Tensor, Tensor]:
    _, tensors, model = case
    mask = tensors["in.question_mask"].bool()
    return question_states(model, tensors["in.video"], tensors["in.question_ids"], mask), mask


def list_of(case: _Case) -> AnswerList:
    _, tensors, model = case
    return prepare_answers(model.text_decoder, tensors["rank.answer_ids"], tensors["rank.answer_mask"].bool())


def batch_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "video": tensors["in.video"],
        "ids": tensors["in.question_ids"],
        "mask": tensors["in.question_mask"].bool(),
        "answer_ids": tensors["in.answer_ids"],
        "answer_mask": tensors["in.answer_mask"].bool(),
        "answer_weights": tensors["in.weights"],
        "answer_question": torch.arange(len(tensors["in.video"])).repeat_interleave(tensors["in.answers_per_question"]),
    }


def tuning_of(case: _Case) -> QuestionTuning:
    config, tensors, model = case
    vit, text = sizes_of(config, tensors)
    tuned = QuestionTuning(vit, text, max_length=config["tlen"], max_answer=config["alen"])
    tuned.model.load_state_dict(model.state_dict())
    return tuned


def test_a_case_is_found() -> None:
    assert CASES


@torch.no_grad()
def test_parity_of_question_states_and_losses(case: _Case) -> None:
    _, theirs, model = case
    states, mask = states_of(case)
    assert relative(states[mask], theirs["out.question_states"][mask]) < LIMIT
    batch = batch_of(theirs)
    losses = answer_losses(model, states, mask, batch["answer_ids"], batch["answer_mask"], batch["answer_question"])
    assert relative(losses, theirs["out.loss_per_answer"]) < LIMIT


def test_parity_of_the_loss_and_every_gradient(case: _Case) -> None:
    _, theirs, _ = case
    tuned = tuning_of(case)
    found = tuned(batch_of(theirs), torch.tensor([1]))
    assert relative(found["loss"].view(1), theirs["out.loss"]) < LIMIT
    found["loss"].backward()
    compare_gradients(tuned.trainable, theirs)


def test_rows_of_weight_0_change_nothing(case: _Case) -> None:
    """A batch is filled up to a fixed number of answers."""
    _, theirs, _ = case
    tuned, batch = tuning_of(case), batch_of(theirs)
    filled = dict(batch)
    for name in ("answer_ids", "answer_mask", "answer_weights", "answer_question"):
        filled[name] = torch.cat([batch[name], batch[name][:3]])
    filled["answer_weights"] = torch.cat([batch["answer_weights"], torch.zeros(3)])
    one, other = (tuned(each, torch.tensor([1]))["loss"] for each in (batch, filled))
    torch.testing.assert_close(one, other)


@torch.no_grad()
def test_parity_of_the_ranking(case: _Case) -> None:
    config, theirs, model = case
    (states, mask), answers = states_of(case), list_of(case)
    first = first_word_probabilities(model.text_decoder, states, mask, answers)
    assert relative(first, theirs["out.first_word_probs"]) < LIMIT
    ranked = rank_answers(model.text_decoder, states, mask, answers, top_k=config["k_test"])
    assert torch.equal(ranked.answers, theirs["out.topk_ids"])
    assert relative(ranked.probabilities, theirs["out.topk_probs"]) < LIMIT
    assert [config["answer_list"][best] for best in ranked.answers[:, 0].tolist()] == config["predictions"]


def test_the_chain_rule_counts_the_first_word_once(case: _Case) -> None:
    """The official scores, less one count of the first word, with the official figures alone."""
    config, theirs, model = case
    (states, mask), answers = states_of(case), list_of(case)
    ids, official = theirs["out.topk_ids"], theirs["out.topk_probs"].double()
    first = theirs["out.first_word_probs"].double().gather(1, ids)
    expected = (official.log() - first.log()).softmax(1).sort(1, descending=True)
    with torch.no_grad():
        ranked = rank_answers(model.text_decoder, states, mask, answers, top_k=config["k_test"], rule="chain")
    assert relative(ranked.probabilities.double(), expected.values) < LIMIT
    assert torch.equal(ranked.answers, ids.gather(1, expected.indices))


@pytest.fixture
def tokenizer(case: _Case, tmp_path: Path) -> BertTokenizerFast:
    """Words are w5, w17, ...: the number is the id."""
    names = {0: "[PAD]", 1: "[CLS]", 2: "[SEP]", 3: "[UNK]", 4: "[MASK]"}
    words = [names.get(number, f"w{number}") for number in range(case[0]["vocab"])]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast.from_pretrained(str(tmp_path))


def test_parity_of_answer_words(case: _Case, tokenizer: BertTokenizerFast) -> None:
    """An answer that is too long loses its closing word, others keep it."""
    config, theirs, _ = case
    ids, mask = answer_tokens(config["answer_list"], tokenizer, max_length=config["alen"])
    expected = theirs["rank.answer_mask"].bool()
    longest = int(expected.sum(1).max())
    assert torch.equal(mask, expected[:, :longest]) and not expected[:, longest:].any()
    assert torch.equal(ids[mask], theirs["rank.answer_ids"][expected])
    closed = [len(text.split()) + 2 <= config["alen"] for text in config["answer_list"]]
    assert (ids == 2).any(1).tolist() == closed
    texts, weights = zip(*(weighted_answers(given) for given in config["annotated_answers"]), strict=True)
    assert [len(part) for part in texts] == theirs["in.answers_per_question"].tolist()
    assert [f"{text} [SEP]" for part in texts for text in part] == config["training_answers"]
    assert [weight for part in weights for weight in part] == pytest.approx(config["training_weights"])
    ids, mask = answer_tokens([text for part in texts for text in part], tokenizer, max_length=config["alen"])
    expected = theirs["in.answer_mask"].bool()
    assert torch.equal(ids[mask], theirs["in.answer_ids"][expected])


def test_parity_of_accuracy(case: _Case, tmp_path: Path) -> None:
    """Letter by letter; a question without a prediction counts as wrong."""
    example = case[0]["accuracy_example"]
    truth = [{"video": __file__, "question": "what"} | entry for entry in example["truth"]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    questions = read_questions([str(tmp_path / "truth.json")], train=False)
    predicted = {str(entry["question_id"]): entry["answer"] for entry in example["predicted"]}
    assert set(predicted) - set(questions.names) or len(predicted) <= len(truth)
    predictions = [Prediction([predicted.get(name, "")], [1.0]) for name in questions.names]
    figures = shares_of(questions, right_rows(questions, predictions, None))
    assert figures == {"accuracy": pytest.approx(example["accuracy"] / 100, abs=0.51e-4)}


def test_flops_are_those_that_run(case: _Case) -> None:
    """Counted by PyTorch over forward and backward of one answer a question."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config, theirs, _ = case
    tuned, batch = tuning_of(case), batch_of(theirs)
    use_attention(tuned, "math")  # whose products are what they are, forward and backward
    count = len(batch["video"])
    own = {name: batch[name][:count] for name in ("answer_ids", "answer_mask", "answer_weights")}
    batch = {name: batch[name] for name in ("video", "ids", "mask")} | own
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tuned(batch, torch.tensor([1]))["loss"].backward()
    assert counter.get_total_flops() / count == pytest.approx(tuned.flops_per_clip(), rel=0.03)


class Words:
    """The questions' ids of a file in place of a tokenizer's."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.batch = batch_of(tensors)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.batch["ids"][rows], self.batch["mask"][rows]


def predictions_of(case: _Case, ranks: Ranks, clips: Tensor) -> list[Prediction]:
    """What answer_batches finds when this rank has some clips, three at a time; each clip is asked one question."""
    config, tensors, model = case
    answers = list_of(case)

    def judge(states: Tensor, mask: Tensor) -> list[Prediction]:
        ranked = rank_answers(model.text_decoder, states, mask, answers, top_k=config["k_test"])
        return [Prediction([config["answer_list"][best]], []) for best in ranked.answers[:, 0].tolist()]

    batches = [{"video": tensors["in.video"][part], "index": part} for part in (clips.split(3) if len(clips) else ())]
    asked = [[row] for row in range(len(tensors["in.video"]))]
    return answer_batches(model, batches, asked, Words(tensors), judge, ranks, batch_size=2)


@pytest.mark.process
@pytest.mark.slow
def test_parity_of_answers_over_ranks_one_of_them_without_questions(case: _Case, tmp_path: Path) -> None:
    config, tensors, _ = case
    count = len(tensors["in.video"])
    one = predictions_of(case, Ranks(0, 1, torch.device("cpu")), torch.arange(count))
    assert [prediction.answers[0] for prediction in one] == config["predictions"]
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/tasks']\n"
        "from pathlib import Path\n"
        "import torch, torch.distributed as dist\n"
        "from test_question_answering_parity import load, predictions_of\n"
        "from umt_fast.engine.distributed import Ranks\n"
        "dist.init_process_group('gloo')\n"
        "rank = dist.get_rank()\n"
        "case = load(Path(sys.argv[2]))\n"
        "every = torch.arange(len(case[1]['in.video']))\n"
        "found = predictions_of(case, Ranks(rank, 3, torch.device('cpu')), every[:0] if rank == 2 else every[rank::2])\n"
        "assert [prediction.answers[0] for prediction in found] == case[0]['predictions']\n"
        "sys.stdout.write(f'equal on {rank}\\n')  # one write: ranks share the pipe\n"
        "dist.destroy_process_group()\n"
    )
    path = next(path for path in CASES if read_case(path)[0] == config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", str(script)]
    done = subprocess.run([*command, str(REPOSITORY), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()[2::3]) == ["0", "1", "2"]


@torch.no_grad()
def test_a_clip_is_read_once_however_many_questions_it_is_asked(case: _Case) -> None:
    """Clips with three questions, one, and four: the states are those of each question with its clip alone."""
    _, tensors, model = case
    batch, words = batch_of(tensors), Words(tensors)
    asked, video = [[0, 2, 1], [3], [1, 0, 3, 2]], tensors["in.video"][:3]
    read = []
    hook = model.vision_encoder.encoder.blocks[0].register_forward_hook(lambda module, x, y: read.append(len(y)))
    parts = list(states_of_clips(model, video, asked, words, at_once=6))
    hook.remove()
    assert read == [3] and [len(numbers) for numbers, _, _ in parts] == [5, 3]
    seen: dict[int, list[Tensor]] = {}
    for numbers, states, mask in parts:
        for number, state, held in zip(numbers, states, mask, strict=True):
            seen.setdefault(number, []).append(state[held])
    for number, found in seen.items():
        ids, mask = batch["ids"][number : number + 1], batch["mask"][number : number + 1]
        clips = [clip for clip, numbers in enumerate(asked) if number in numbers]
        alone = [question_states(model, video[clip : clip + 1], ids, mask)[0][mask[0]] for clip in clips]
        assert len(found) == len(alone)
        for one in alone:
            assert min(relative(other, one) for other in found) < 1e-5


def test_answers_beside_each_other_and_one_after_another_cost_the_same(case: _Case) -> None:
    """(B, A, l) rows, filled up with empty ones of weight 0, give the loss and gradients of (M, l) rows."""
    _, tensors, _ = case
    batch, counts = batch_of(tensors), tensors["in.answers_per_question"].tolist()
    beside = {name: batch[name] for name in ("video", "ids", "mask")}
    rows, length = max(counts) + 1, batch["answer_ids"].shape[1]
    beside["answer_ids"] = torch.zeros(len(counts), rows, length, dtype=torch.int64)
    beside["answer_mask"] = torch.zeros(len(counts), rows, length, dtype=torch.bool)
    beside["answer_weights"] = torch.zeros(len(counts), rows)
    for row, (ids, mask, weights) in enumerate(
        zip(*(batch[name].split(counts) for name in ("answer_ids", "answer_mask", "answer_weights")), strict=True)
    ):
        beside["answer_ids"][row, : len(ids)], beside["answer_mask"][row, : len(ids)] = ids, mask
        beside["answer_weights"][row, : len(ids)] = weights
    one, other = tuning_of(case), tuning_of(case)
    first, second = one(batch, torch.tensor([1]))["loss"], other(beside, torch.tensor([1]))["loss"]
    torch.testing.assert_close(first, second)
    first.backward()
    second.backward()
    for (name, own), its in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, its.grad, rtol=1e-4, atol=1e-5, msg=name)
