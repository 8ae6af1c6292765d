"""The clips of a file of `embed`, and which of them are nearest to an embedding.

Legend: V clips, E width of their embeddings.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from umt_fast.config import require
from umt_fast.extras import packages_of
from umt_fast.files import atomic_path
from umt_fast.tasks.ranking import nearest

Index = Literal["exact", "hnsw"]


class Gallery:
    """Texts are compared by the product of embeddings, as retrieval does first; clips by the cosine.

    index `exact` compares with every clip. `hnsw` asks a graph of neighbors (faiss), which may miss some: for galleries of
    millions.
    """

    def __init__(
        self, vectors: dict[str, Tensor], names: list[str], *, index: Index = "exact", beside: Path | None = None
    ) -> None:
        """vectors: as `embed` writes them, (V, E) `embedding`, (V, C) `pooled`. beside: their file; a graph is kept beside it.

        Raises ConfigError: not as many names as clips. MissingPackageError: no faiss.
        """
        embeddings = vectors.get("embedding", vectors["pooled"]).float()
        require(len(names) == len(embeddings), f"{len(embeddings)} clips have {len(names)} names; `embed` them again")
        self.names, self.reads_texts = names, "embedding" in vectors
        self.embeddings, self.directions = embeddings, F.normalize(embeddings, dim=1)
        self._graphs = None
        if index == "hnsw":
            kinds = {"text": self.embeddings, "clip": self.directions}
            self._graphs = {kind: _graph(kind, rows, beside) for kind, rows in kinds.items()}

    def of_text(self, embedding: Tensor, top: int) -> list[tuple[int, float]]:
        """The `top` nearest clips of a text's (E,): row and score, best first."""
        return self._nearest("text", self.embeddings, embedding, top)

    def of_clip(self, row: int, top: int) -> list[tuple[int, float]]:
        """The `top` nearest clips of a clip, which is left out itself."""
        found = self._nearest("clip", self.directions, self.directions[row], top + 1)
        return [(other, score) for other, score in found if other != row][:top]

    def _nearest(self, kind: str, items: Tensor, query: Tensor, top: int) -> list[tuple[int, float]]:
        top = min(top, len(items))
        query = query.float().cpu()
        if self._graphs is None:
            rows, scores = (part[0] for part in nearest(query[None], items, top))
        else:
            graph = self._graphs[kind]
            graph.hnsw.efSearch = max(128, 4 * top)
            scores, rows = (part[0] for part in graph.search(query[None].numpy(), top))
        return list(zip(rows.tolist(), scores.tolist(), strict=True))


def _graph(kind: str, rows: Tensor, beside: Path | None) -> Any:
    """A graph of rows by inner product, read from the file beside the features where it is of the same rows."""
    with packages_of("index"):
        import faiss

    values = rows.contiguous().numpy()
    digest = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
    kept = None if beside is None else beside.with_name(f"{beside.name}.{kind}-{digest}.hnsw")
    if kept is not None and kept.is_file():
        return faiss.read_index(str(kept))
    graph = faiss.IndexHNSWFlat(values.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 200
    graph.add(values)
    if kept is not None:
        with atomic_path(kept, shared=True, errors=(RuntimeError,)) as temporary:
            faiss.write_index(graph, str(temporary))
    return graph
