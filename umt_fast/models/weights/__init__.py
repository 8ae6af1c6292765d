"""Weights in and out in the official layouts.

`files` reads and writes them, `torchscript` reads OpenAI's archives without running them, `layouts` puts them into our
models, `downstream` into those of the video-text tasks; `clip` and `timm_vit` read what teachers are filled with
(models/teachers). Nothing is left random in silence: each key that finds no partner is listed, and unless it is one that is
expected to be absent (a fresh classification head, say) loading fails.
"""

from umt_fast.models.weights.detection import fit_detector, load_detector
from umt_fast.models.weights.downstream import fit_retrieval, load_question, load_retrieval
from umt_fast.models.weights.files import (
    CONFIG,
    WEIGHTS,
    UnreadableError,
    WeightsError,
    WeightsFile,
    folder_record,
    is_saved_folder,
    load_state,
    read_weights,
    recorded,
    save_state,
    vocabulary_in,
)
from umt_fast.models.weights.layouts import (
    fit,
    fit_classifier,
    fit_video_text,
    kind_of,
    load_bert,
    load_encoder,
    load_student,
    load_video_text,
    start_video_text,
)

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "UnreadableError",
    "WeightsError",
    "WeightsFile",
    "fit",
    "fit_classifier",
    "fit_retrieval",
    "fit_detector",
    "fit_video_text",
    "folder_record",
    "is_saved_folder",
    "kind_of",
    "load_bert",
    "load_detector",
    "load_encoder",
    "load_question",
    "load_retrieval",
    "load_state",
    "load_student",
    "load_video_text",
    "read_weights",
    "recorded",
    "save_state",
    "start_video_text",
    "vocabulary_in",
]
