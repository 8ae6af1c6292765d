"""Fine-tuned retrieval against the official implementation: every `retrieval_*.safetensors` of parity_files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.downstream_cases import LIMIT, compare_gradients, sizes_of, state_of
from tests.parity_files import parity_files, read_case, relative
from tests.tasks.galleries import Captions, Gallery
from umt_fast.config import DataConfig
from umt_fast.data.sources.pairs import match_ids
from umt_fast.engine.distributed import Ranks
from umt_fast.models.downstream import RetrievalModel
from umt_fast.models.weights import fit
from umt_fast.tasks import ranking, retrieval
from umt_fast.tasks import video_text_losses as vision_text
from umt_fast.tasks.retrieval_tuning import RetrievalTuning, retrieval_losses

CASES = parity_files("retrieval")
ONE = Ranks(0, 1, torch.device("cpu"))
_Case = tuple[dict, dict[str, Tensor], RetrievalModel]


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> _Case:
    return load(request.param)


def load(path: Path) -> _Case:
    config, tensors = read_case(path)
    vit, text = sizes_of(config, tensors)
    model = RetrievalModel(vit, text, embed_dim=config["emb"]).eval()
    fit(model, state_of(tensors, model), str(path))
    return config, tensors, model


def batch_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "video": tensors["in.video"],
        "ids": tensors["in.input_ids"],
        "mask": tensors["in.attention_mask"].bool(),
        "index": tensors["in.idx"],
        "seed": torch.tensor([1]),
    }


def test_a_case_is_found() -> None:
    assert CASES


@torch.no_grad()
def test_parity_of_embeddings(case: _Case) -> None:
    config, theirs, model = case
    batch = batch_of(theirs)
    tokens, _ = model.vision_encoder.embed(batch["video"])
    pooled = model.vision_encoder.pool(tokens, config["t"])
    hidden = model.text_encoder.encode(batch["ids"], batch["mask"])
    assert relative(tokens, theirs["out.vision_embeds"]) < LIMIT
    assert relative(pooled, theirs["out.pooled"]) < LIMIT
    assert relative(hidden[batch["mask"]], theirs["out.text_embeds"][batch["mask"]]) < LIMIT
    sim = model.project_vision(pooled) @ model.project_text(hidden).t() / model.temperature
    assert relative(sim, theirs["out.sim_v2t"]) < LIMIT


def test_parity_of_losses_and_every_gradient(case: _Case) -> None:
    _, theirs, model = case
    model.zero_grad()
    negatives = theirs["in.vision_negatives"], theirs["in.text_negatives"]
    found = retrieval_losses(model, negatives=negatives, **batch_of(theirs))
    for name in ("vtc", "vtm"):
        assert relative(found[name].view(1), theirs[f"out.loss_{name}"]) < LIMIT, name
    found["loss"].backward()
    compare_gradients(model, theirs)


@torch.no_grad()
def test_parity_of_matching_logits(case: _Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs that the loss judges: right ones, each text with another clip, each clip with another text."""
    _, theirs, model = case
    judged = []
    monkeypatch.setattr(
        vision_text, "matching_loss", lambda *logits: judged.append(torch.cat(logits)) or logits[0].sum()
    )
    negatives = theirs["in.vision_negatives"], theirs["in.text_negatives"]
    retrieval_losses(model, negatives=negatives, **batch_of(theirs))
    assert relative(judged[0], theirs["out.match_logits"]) < LIMIT


@torch.no_grad()
def test_parity_of_negative_weights(case: _Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What negatives are drawn by, up to a factor of each row; rows of one sample are never drawn."""
    _, theirs, model = case
    drawn = []

    def noting(weights: Tensor, count: int, seed: Tensor) -> Tensor:
        drawn.append(weights)
        return weights.argmax(1, keepdim=True)

    monkeypatch.setattr("kernels.sample_visible", noting)
    retrieval_losses(model, **batch_of(theirs))
    for ours, name in zip(drawn, ("t2v", "v2t"), strict=True):
        expected = theirs[f"out.negative_weights_{name}"]
        assert torch.equal(ours == 0, expected == 0)
        assert relative(ours / ours.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True)) < LIMIT


def test_parity_of_gallery_scores_and_recalls(case: _Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert case[0]["gallery"]
    for name in case[0]["gallery"]:
        compare_gallery(case, name, monkeypatch)


def compare_gallery(case: _Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One set of texts: several captions a clip, or several clips a caption."""
    config, theirs, model = case
    gallery, video = config["gallery"][name], theirs["gallery.video"]
    monkeypatch.setattr(retrieval, "ClipLoader", lambda clips, *_, **more: ({"video": part} for part in video.split(5)))
    # Memory not filled is NaN: nothing of it may count, not even with a weight of zero.
    monkeypatch.setattr(retrieval.Keeper, "empty", lambda _, *shape: torch.full(shape, torch.nan))
    listed = {int(row): [texts] if isinstance(texts, int) else texts for row, texts in gallery["text_of_video"].items()}
    right = torch.tensor(sorted((row, text) for row, texts in listed.items() for text in texts))
    queries = Gallery(range(len(video)), range(len(gallery["texts"])), right)
    tokens = Captions(theirs[f"{name}.input_ids"], theirs[f"{name}.attention_mask"])
    for top_k, kind in ((0, "dual"), (config["k_test"], "match")):
        figures, v2t, t2v = retrieval.evaluate(
            model, queries, tokens, DataConfig(), ONE, top_k=top_k, batch_size=5, pairs=3
        )
        for found, way in ((v2t, "v2t"), (t2v, "t2v")):
            expected = theirs[f"out.{name}.{kind}_{way}"].sort(1, descending=True)
            kept = found.items.shape[1]
            assert relative(found.scores, expected.values[:, :kept]) < LIMIT, (kind, way)
            assert torch.equal(found.items, expected.indices[:, :kept]), (kind, way)
            if kind == "match":  # and beyond those nothing is scored
                assert (expected.values[:, kept:] == config["unscored"]).all()
                assert (expected.values[:, :kept] != config["unscored"]).all()
        official = ranking.official_recalls(v2t.place, t2v.place)
        expected = gallery[f"recall_{kind}"]
        if 0 < top_k < 10 and top_k < max(len(video), len(gallery["texts"])):
            # Officially R@k of fewer candidates depends on how a sort leaves equal scores.
            expected = {
                key: value for key, value in expected.items() if key.endswith(("_r1", "_r5")[: 1 + (top_k >= 5)])
            }
        assert {key: official[key] for key in expected} == pytest.approx(expected, abs=0.0051)
        assert official["r_mean"] == pytest.approx(100 * figures[f"{kind}_r_mean"], abs=0.0051)


def test_more_frames_than_in_pre_training_continue_the_position_table(case: _Case) -> None:
    """The first frames' positions are those of a shorter clip, and later ones are no interpolation of them."""
    config, _, model = case
    table = model.vision_encoder.encoder.position
    per_frame = model.vision_encoder.encoder.grid.per_frame
    n = torch.arange(config["t"] * per_frame, dtype=torch.float64)
    torch.testing.assert_close(table[:, 0].double(), n.sin(), rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, 1].double(), n.cos(), rtol=0, atol=1e-6)


def test_ids_by_name_or_caption() -> None:
    assert match_ids(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
    assert match_ids([]).shape == (0,)


def test_the_objective_trains_and_says_what_it_costs(case: _Case) -> None:
    config, theirs, model = case
    vit, text = sizes_of(config, theirs)
    tuned = RetrievalTuning(vit, text, embed_dim=config["emb"], max_length=config["tlen"])
    tuned.model.load_state_dict(model.state_dict())
    batch = batch_of(theirs)
    batch = {"video": batch["video"], "ids": batch["ids"], "mask": batch["mask"], "sample": batch["index"]}
    rate, losses = 1e-2, []
    for _ in range(4):
        tuned.zero_grad()
        found = tuned(batch, torch.tensor([3]))
        found["loss"].backward()
        with torch.no_grad():
            for parameter in tuned.trainable.parameters():
                parameter -= rate * parameter.grad
        losses.append(found["loss"].item())
    assert losses[-1] < losses[0]
    assert found["loss"].item() == pytest.approx((found["vtc"] + found["vtm"]).item())
    with_matching = tuned.flops_per_clip()
    alone = RetrievalTuning(vit, text, embed_dim=config["emb"], max_length=config["tlen"], vtm=0.0)
    assert alone.has_unused_parameters and not tuned.has_unused_parameters
    assert alone.flops_per_clip() < with_matching
    assert alone(batch, torch.tensor([3])).keys() == {"loss", "vtc"}
    with pytest.raises(ValueError, match="weights are vtc 0"):
        RetrievalTuning(vit, text, embed_dim=4, vtc=0.0, vtm=0.0)


def test_flops_are_those_that_run(case: _Case) -> None:
    """Counted by PyTorch over forward and backward of one batch."""
    from torch.utils.flop_counter import FlopCounterMode

    config, theirs, model = case
    vit, text = sizes_of(config, theirs)
    # `math`: its products are what they are, forward and backward.
    tuned = RetrievalTuning(vit, text, embed_dim=config["emb"], max_length=config["tlen"], attention="math")
    batch = batch_of(theirs)
    batch = {"video": batch["video"], "ids": batch["ids"], "mask": batch["mask"], "sample": batch["index"]}
    with FlopCounterMode(display=False) as counter:
        tuned(batch, torch.tensor([3]))["loss"].backward()
    assert counter.get_total_flops() / len(batch["ids"]) == pytest.approx(tuned.flops_per_clip(), rel=0.03)
