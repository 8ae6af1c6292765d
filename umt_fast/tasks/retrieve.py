"""`eval retrieve`: which of a list's clips belongs to a caption, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from umt_fast.config import DataConfig, require
from umt_fast.data.sources.queries import Queries, read_queries
from umt_fast.engine.distributed import Ranks
from umt_fast.files import write_json
from umt_fast.models.weights import WeightsFile
from umt_fast.tasks.base import register_evaluation
from umt_fast.tasks.matching import TASKS_WITH_TEXT, TextOptions, load_matcher, whole_frames
from umt_fast.tasks.ranking import Found
from umt_fast.tasks.retrieval import LISTED, evaluate


@dataclass(frozen=True, kw_only=True)
class RetrieveOptions(TextOptions):
    """How retrieval is judged."""

    top_k: int = 128
    """Candidates that the matching head re-ranks; 0: none; more than there is: all."""
    captions: Literal["each", "paragraph"] = "each"
    """A list of captions in one entry is a query each (MSVD), or one paragraph (DiDeMo, ActivityNet)."""
    memory_gib: float = 8.0
    """Main memory of a rank for kept vision tokens and text outputs; beyond it a file in TMPDIR."""

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
    """Retrieval on a caption list, zero-shot or fine-tuned; data/sources/queries.py says what a list may be."""

    name, tasks, Options = "retrieve", TASKS_WITH_TEXT, RetrieveOptions

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
        queries = read_queries(list_path, data.root, joining=options.captions, workers=data.workers)
        matcher = load_matcher(file, described, source, options, ranks)
        figures, v2t, t2v = evaluate(
            matcher.model,
            queries,
            matcher.tokens(queries.captions),
            whole_frames(data),
            ranks,
            top_k=options.top_k,
            batch_size=options.batch_size,
            memory=int(options.memory_gib * 2**30),
            dtype=matcher.dtype,
        )
        if options.scores is not None and ranks.first:
            write_json(options.scores, listing(queries, v2t, t2v))
        return figures


register_evaluation(Retrieve())
