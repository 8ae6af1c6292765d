"""Trained models in `mteb`, the benchmark of embeddings: its video tasks, by the vectors that `embed` writes.

    import mteb, umt_fast
    from umt_fast.mteb import MtebModel

    model = MtebModel(umt_fast.load_model(weights="runs/stage2/checkpoint-00010.pt"))
    mteb.evaluate(model, mteb.get_tasks(tasks=["MSRVTTT2V"]))

Every model has video classification, clustering and pair classification; those that read texts also retrieval and zero-shot
classification. Frames are chosen, decoded and cut as our own evaluation does, not by mteb's decoder. Sound is not heard.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from umt_fast.config import ConfigError, DataConfig, require
from umt_fast.data.loaders.given import pixels_of
from umt_fast.extras import packages_of
from umt_fast.pretrained.base import PretrainedModel
from umt_fast.pretrained.video_text import VideoTextModel

with packages_of("mteb"):
    from datasets import Video
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import PromptType

Vector = Literal["auto", "pooled", "embedding"]


class Pixels:
    """Rows of a data set, whose `video` is as it is stored -> uint8 (B, T, S, S, 3), as evaluation cuts them. Picklable."""

    def __init__(self, view: DataConfig, num_frames: int, image_size: int) -> None:
        self.view, self.sizes = view, {"num_frames": num_frames, "image_size": image_size}

    def __call__(self, rows: list[Mapping[str, Mapping[str, Any]]]) -> Tensor:
        """Raises DataError: a video that cannot be read."""
        return torch.cat([self._read(row["video"]) for row in rows])

    def _read(self, video: Mapping[str, Any]) -> Tensor:
        if video["bytes"] is None:
            return pixels_of(video["path"], self.view, **self.sizes)
        with tempfile.NamedTemporaryFile(prefix="umt_fast-") as file:
            file.write(video["bytes"])
            file.flush()
            return pixels_of(file.name, self.view, **self.sizes)


class MtebModel(AbsEncoder):
    """An encoder as mteb.evaluate takes it."""

    def __init__(self, model: PretrainedModel, name: str = "", *, vector: Vector = "auto") -> None:
        """
        Args:
            model: What load_model or from_pretrained gives.
            name: ORGANIZATION/MODEL, under which mteb files its results; empty: umt_fast/ and the kind of the model. Weights
                are told apart by the revision, a hash of them.
            vector: `pooled` features, or the `embedding` that texts are compared with; auto: the latter where there is one.

        Raises ConfigError: a name of another form, an embedding of a model that has none.
        """
        require(not name or name.count("/") == 1, f"name is {name!r}; write it as ORGANIZATION/MODEL")
        self.model, self.reads = model, isinstance(model, VideoTextModel)
        require(
            vector != "embedding" or self.reads,
            f"vector is 'embedding', and a {type(model).__name__} has none; give 'pooled' or 'auto'",
        )
        self.vector = ("embedding" if self.reads else "pooled") if vector == "auto" else vector
        joint = self.vector == "embedding"
        width = model.description["embed_dim"] if joint else model.vit.width
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name or f"umt_fast/{model.task}",
                "revision": model.fingerprint(),
                "n_parameters": sum(parameter.numel() for parameter in model.network.parameters()),
                "embed_dim": width,
                "framework": ["PyTorch"],
                "modalities": ["video", "text"] if joint else ["video"],
                # As retrieval ranks them: a clip's embedding is the mean of its frames' unit vectors, and not made one again.
                "similarity_fn_name": ScoringFunction.DOT_PRODUCT if joint else ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> np.ndarray:
        """fp32 (N, E) vectors of the rows of a data set with a column `video` or `text`. Prompts and options are not used.

        Raises:
            ConfigError: texts for a model that reads none, rows that have a video and a text, rows that have neither.
            DataError: a video that cannot be read, a text without a word.
        """
        columns = set(getattr(inputs.dataset, "column_names", ()))
        task = task_metadata.name
        if {"video", "text"} <= columns:
            raise ConfigError(f"{task} asks for one vector of a video and a text together, which these models have not")
        if columns & {"audio", "image"}:
            raise ConfigError(
                f"{task} has {sorted(columns & {'audio', 'image'})} beside, which these models do not take"
            )
        if "video" in columns:
            return self._videos(inputs)
        if "text" not in columns:
            raise ConfigError(f"{task} has the columns {sorted(columns)}; these models take a `video` or a `text`")
        if self.vector != "embedding":
            wanted = "a stage-2 or retrieval model" if not self.reads else "vector='embedding'"
            raise ConfigError(f"{task} has texts, and {self.vector} vectors are of videos alone; give {wanted}")
        return torch.cat([self.model.encode_text(batch["text"]).float().cpu() for batch in inputs]).numpy()

    def _videos(self, inputs: DataLoader) -> np.ndarray:
        model = self.model
        # mteb's loader would decode by its own rule; rows as they are stored go to our reader.
        loader = DataLoader(
            inputs.dataset.select_columns("video").cast_column("video", Video(decode=False)),
            batch_size=inputs.batch_size,
            num_workers=inputs.num_workers,
            collate_fn=Pixels(model.view, model.vit.num_frames, model.vit.image_size),
        )
        found = [model.vectors_of_pixels(pixels.to(model.device))[self.vector] for pixels in loader]
        return torch.cat([vectors.float().cpu() for vectors in found]).numpy()
