"""Students of stage 1 and classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from umt_fast.config import require
from umt_fast.data.loaders.given import Videos
from umt_fast.models.classifier import Classifier
from umt_fast.models.description import vit_config
from umt_fast.models.outputs import Predictions
from umt_fast.models.student import Student
from umt_fast.models.vit import VisionTransformer, position_table
from umt_fast.models.weights import (
    fit,
    fit_classifier,
)
from umt_fast.pretrained.base import PretrainedModel


class StudentModel(PretrainedModel):
    """The student of stage 1. `pooled` is the plain mean of its tokens: stage 1 trains no norm of it."""

    task = "pretraining"
    network: Student

    @classmethod
    def empty(cls, description: dict[str, Any]) -> Student:
        return Student(vit_config(description), description["num_layers"], description["output_dim"])

    @classmethod
    def fill(cls, network: nn.Module, state: dict[str, Tensor], source: str) -> None:
        fit(network, state, source)

    @property
    def tower(self) -> VisionTransformer:
        return self.network.encoder

    def _finish(self, last: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tower.norm(last)
        return tokens, tokens.mean(1)


class ClassifierModel(PretrainedModel):
    """A fine-tuned classifier: one centered view of each clip, as `eval` judges it."""

    task = "classification"
    network: Classifier

    @classmethod
    def empty(cls, description: dict[str, Any]) -> Classifier:
        return Classifier(vit_config(description), description["num_classes"])

    @classmethod
    def fill(cls, network: nn.Module, state: dict[str, Tensor], source: str) -> None:
        with torch.no_grad():
            fit_classifier(network, state, source)

    @property
    def tower(self) -> VisionTransformer:
        return self.network

    @torch.no_grad()
    def logits(self, videos: Videos) -> Tensor:
        """(B, K) logits; videos and errors as for features."""
        with self._autocast():
            return self.network(self.pixels(videos)).float()

    def predict(self, videos: Videos, top: int = 5) -> Predictions:
        """The `top` most probable classes of each clip, or all there are. Raises as features; ConfigError: top below 1."""
        require(top >= 1, f"top is {top}; it must be at least 1")
        shares, classes = self.logits(videos).softmax(1).topk(min(top, self.description["num_classes"]))
        return Predictions(classes, shares)

    def _finish(self, last: Tensor) -> tuple[Tensor, Tensor]:
        return last, self.network.fc_norm(last.mean(1))

    def _state(self) -> dict[str, Tensor]:
        state, table = self.network.state_dict(), self.network.position
        # A file's own position table is used as it is; it may differ from the one that the description makes.
        own = torch.equal(table.cpu(), position_table(self.network.config))
        return state if own else state | {"pos_embed": table[None]}
