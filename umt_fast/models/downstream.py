"""The models that are fine-tuned for video-text tasks after stage 2, under their official names.

Neither has a teacher, alignment heads or a masked-language head; the text encoder is plain BERT. Every token of a clip is
seen. Positions of more frames than in pre-training continue the table (they are not interpolated): leave
VitConfig.position_grid empty.
"""

from __future__ import annotations

from torch import nn

from umt_fast.config import TextConfig, VitConfig
from umt_fast.models.answer_decoder import AnswerDecoder
from umt_fast.models.text import Bert, initialize_text
from umt_fast.models.video_text import Matching, VisionTower


class RetrievalModel(Matching):
    """Fine-tuned retrieval and multiple choice: clips and texts compared frame by frame and matched."""

    def __init__(self, vit: VitConfig, text: TextConfig, *, embed_dim: int, temperature: float = 0.07) -> None:
        encoder = Bert(text, vit.width)
        initialize_text(encoder, text)
        super().__init__(VisionTower(vit, 0, 0), encoder, embed_dim=embed_dim, temperature=temperature)


class QuestionModel(nn.Module):
    """Question answering: the whole BERT reads the question with the clip, a causal decoder gives the answer."""

    def __init__(self, vit: VitConfig, text: TextConfig) -> None:
        super().__init__()
        self.vision_encoder = VisionTower(vit, 0, 0, pools=False)
        self.text_encoder = Bert(text, vit.width)
        initialize_text(self.text_encoder, text)
        self.text_decoder = AnswerDecoder(text)

    @property
    def shard_units(self) -> list[nn.Module]:
        """The modules whose parameters are used in their own forward alone: blocks of the tower and text layers."""
        return [*self.vision_encoder.shard_units, *self.text_encoder.text_layers]
