"""Trained models to be used, one class for each task; importing this package makes all known to `build`."""

from umt_fast.models.weights import CONFIG, WEIGHTS
from umt_fast.pretrained.base import DTYPES, Dtype, PretrainedModel, build
from umt_fast.pretrained.detector import DetectorModel
from umt_fast.pretrained.questions import Answer, QuestionAnsweringModel
from umt_fast.pretrained.towers import ClassifierModel, StudentModel
from umt_fast.pretrained.video_text import TunedVideoTextModel, VideoTextModel

__all__ = [
    "CONFIG",
    "DTYPES",
    "WEIGHTS",
    "Answer",
    "ClassifierModel",
    "DetectorModel",
    "Dtype",
    "PretrainedModel",
    "QuestionAnsweringModel",
    "StudentModel",
    "TunedVideoTextModel",
    "VideoTextModel",
    "build",
]
