"""`eval retrieve`: which of a list's clips belongs to a caption, and the other way round, by a stage-2 model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from umt_fast.config import DataConfig, require
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.queries import Queries, read_queries
from umt_fast.engine.distributed import Ranks
from umt_fast.files import write_json
from umt_fast.models.description import text_config, vit_config
from umt_fast.models.video_text import VideoText
from umt_fast.models.weights import WeightsFile, fit_video_text
from umt_fast.tasks.base import EvalOptions, register_evaluation
from umt_fast.tasks.retrieval import LISTED, Found, evaluate


@dataclass(frozen=True, kw_only=True)
class RetrieveOptions(EvalOptions):
    """How retrieval is judged."""

    top_k: int = 128
    """Candidates that the matching head re-ranks; 0: none; more than there is: all."""
    captions: Literal["each", "paragraph"] = "each"
    """A list of captions in one entry is a query each (MSVD), or one paragraph (DiDeMo, ActivityNet)."""
    max_length: int = 0
    """Tokens of a caption (DiDeMo 64, ActivityNet 150, LSMDC 96); 0: as in training."""
    memory_gib: float = 8.0
    """Main memory of a rank for kept vision tokens and text outputs; beyond it a file in TMPDIR."""
    tokenizer: str = ""
    """By name, or a folder with a vocab.txt; empty: as the run was given it, or the usual one of the named model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "memory_gib"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")


def listing(queries: Queries, v2t: Found, t2v: Found) -> dict[str, list[dict[str, Any]]]:
    """The ten best of every query by name, with scores: what `eval --scores` writes."""
    right_texts, right_clips = ([[] for _ in range(len(side))] for side in (queries.clips, queries.captions))
    for clip, text in queries.right.tolist():
        right_texts[clip].append(text)
        right_clips[text].append(clip)

    def best(found: Found, query: int, name: Any) -> list[list[Any]]:
        row = zip(found.items[query, :LISTED].tolist(), found.scores[query, :LISTED].tolist(), strict=True)
        return [[name(item), round(score, 5)] for item, score in row]

    def clip_of(row: int) -> str:
        return queries.clips[row].name

    def caption_of(row: int) -> str:
        return queries.captions[row]

    return {
        "t2v": [
            {
                "caption": caption_of(query),
                "right": [clip_of(row) for row in right_clips[query]],
                "rank": t2v.rank[query].item() + 1,
                "found": best(t2v, query, clip_of),
            }
            for query in range(len(queries.captions))
        ],
        "v2t": [
            {
                "clip": clip_of(query),
                "right": [caption_of(row) for row in right_texts[query]],
                "rank": v2t.rank[query].item() + 1,
                "found": best(v2t, query, caption_of),
            }
            for query in range(len(queries.clips))
        ],
    }


class Retrieve:
    """Zero-shot retrieval on a caption list; see data/sources/queries.py for what a list may be."""

    name, tasks, Options = "retrieve", ("video_text",), RetrieveOptions

    def run(
        self,
        file: WeightsFile,
        described: dict[str, Any],
        source: Path,
        list_path: Path,
        data: DataConfig,
        options: RetrieveOptions,
        ranks: Ranks,
    ) -> dict[str, Any]:
        """Recalls both ways, `dual_*`, `match_*`, `both_*`; see retrieval.evaluate. With scores the ten best of every query."""
        least, limit, max_length = (
            3 if described["sep_token"] else 2,
            described["text"]["max_positions"],
            options.max_length,
        )
        require(
            max_length == 0 or least <= max_length <= limit,
            f"max_length is {max_length}; it must lie in [{least}, {limit}], the positions of this model's text encoder "
            "(0: as trained)",
        )
        record = file.rest.get("config")
        own = record.get("tokenizer", "") if isinstance(record, dict) else ""
        words = _tokenizer(options.tokenizer, own, described["text"]["vocab_size"], source)
        queries = read_queries(list_path, data.root, joining=options.captions, workers=data.workers)
        model = VideoText(
            vit_config(described),
            text_config(described),
            num_layers=described["num_layers"],
            output_dim=described["output_dim"],
            embed_dim=described["embed_dim"],
        )
        fit_video_text(model, file.state, str(source))
        tokens = Tokens(
            queries.captions, words, max_length=max_length or described["max_length"], sep=described["sep_token"]
        )
        whole = replace(data, sampling="intervals", augment="whole")
        figures, v2t, t2v = evaluate(
            model.to(ranks.device),
            queries,
            tokens,
            whole,
            ranks,
            top_k=options.top_k,
            batch_size=options.batch_size,
            memory=int(options.memory_gib * 2**30),
        )
        if options.scores is not None and ranks.first:
            write_json(options.scores, listing(queries, v2t, t2v))
        return figures


def _tokenizer(given: str, usual: str, vocab_size: int, checkpoint: Path) -> Any:
    """The given tokenizer, or the model's usual one. Raises DataError, ConfigError: none, or not the model's."""
    require(
        bool(given or usual), f"{checkpoint} does not say which tokenizer it was trained with; give it: --tokenizer"
    )
    try:
        tokenizer = load_tokenizer(given or usual)
    except DataError as error:
        if given:
            raise
        raise DataError(
            f"{error}. The model of {checkpoint} was trained with it; if it has moved, say where: --tokenizer"
        ) from error
    require(
        len(tokenizer) <= vocab_size,
        f"the tokenizer {given or usual} has {len(tokenizer)} words, but the model of {checkpoint} knows {vocab_size}; give "
        "the one it was trained with: --tokenizer",
    )
    return tokenizer


register_evaluation(Retrieve())
