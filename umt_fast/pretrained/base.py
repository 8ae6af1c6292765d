"""Trained models to be used: features of clips, embeddings of clips and texts, classes.

Every model holds the network that its task trains, under the official names, and the description of it. Frames are chosen
and pixels made as evaluation does. Nothing is masked, no gradient is recorded, results are fp32 on the model's device.

Legend: B clips, T frames of a clip, t, h, w token frames, rows and columns, C width, E embedding width, N texts, K classes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from umt_fast.config import ConfigError, DataConfig, Vocabulary, require
from umt_fast.data.loaders.given import Videos, pixels_of
from umt_fast.data.loaders.tokens import load_vocabulary, vocabulary_of
from umt_fast.data.sources.clip import DataError
from umt_fast.engine.precision import device_of
from umt_fast.files import checksum, write_json
from umt_fast.models.description import found_in, vit_config
from umt_fast.models.outputs import Features
from umt_fast.models.vit import VisionTransformer
from umt_fast.models.weights import (
    CONFIG,
    WEIGHTS,
    WeightsError,
    folder_record,
    is_saved_folder,
    read_weights,
    save_state,
    vocabulary_in,
)

_TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
Dtype = Literal["bf16", "fp32"] | torch.dtype
DTYPES: dict[Any, str] = {torch.bfloat16: "bf16", torch.float32: "fp32", "bf16": "bf16", "fp32": "fp32"}

CLASSES: dict[str, type[PretrainedModel]] = {}
"""The model of each task, which its class statement puts here."""

_CARD = """---
{{ card_data }}
---

A video model of Unmasked Teacher (arXiv 2303.16058), saved by umt_fast. `umt_fast.from_pretrained(THIS)` loads it;
config.json says what it is of, model.safetensors holds the weights under the official names.
"""


class PretrainedModel(
    ABC,
    nn.Module,
    ModelHubMixin,
    library_name="umt_fast",
    tags=["video", "unmasked-teacher"],
    model_card_template=_CARD,
):
    """A trained network of one task, and what it is of. `load_model` and `from_pretrained` make it.

    save_pretrained(folder) writes config.json (the description) and model.safetensors, push_to_hub(repo_id) the same to
    Hugging Face. `network` is the module that was trained; `description` says what it is of (models/description.py).
    """

    task: ClassVar[str] = ""
    sampling: ClassVar[Any] = "sparse"
    augment: ClassVar[Any] = "center"

    def __init__(
        self, network: nn.Module, description: dict[str, Any], *, compute: str = "fp32", words: Vocabulary | None = None
    ) -> None:
        """compute: `fp32`, or `bf16` for autocast. words: the tokenizer of a model that reads texts."""
        super().__init__()
        self.network, self.description, self.compute = network, description, compute
        self.words = words or Vocabulary()
        self.vit = vit_config(description)
        self.requires_grad_(False).eval()

    def __getattr__(self, name: str) -> Any:
        """Torch's own, except that what other models have, as `predict`, is told with theirs."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            theirs = [f"{kind.__name__} ({task})" for task, kind in CLASSES.items() if hasattr(kind, name)]
            if name.startswith("_") or not theirs:
                raise
            raise AttributeError(
                f"{name} is not for a {type(self).__name__} ({self.task}); it is for models of the kind {', '.join(theirs)}"
            ) from None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.task:
            CLASSES[cls.task] = cls

    @classmethod
    @abstractmethod
    def empty(cls, description: dict[str, Any]) -> nn.Module:
        """The network with fresh weights."""

    @classmethod
    @abstractmethod
    def fill(cls, network: nn.Module, state: dict[str, Tensor], source: str) -> None:
        """Copies weights into it. Raises WeightsError: they do not fit."""

    @property
    @abstractmethod
    def tower(self) -> VisionTransformer:
        """The video ViT."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def pixels(self, videos: Videos) -> Tensor:
        """uint8 (B, T, S, S, 3) on the model's device, as evaluation makes them. Raises DataError."""
        pixels = pixels_of(videos, self.view, num_frames=self.vit.num_frames, image_size=self.vit.image_size)
        return pixels.to(self.device)

    @property
    def view(self) -> DataConfig:
        """Which frames of a clip it sees, and which part of them."""
        return DataConfig(sampling=self.sampling, augment=self.augment)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, n, C), in the dtype of computing, and pooled fp32 (B, C), both as in features.

        pixels: uint8 (B, T, S, S, 3) on the model's device, cut as `pixels` cuts them.
        """
        with self._autocast():
            tokens, pooled = self._finish(self._outputs(pixels, 1)[-1])
        return tokens, pooled.float()

    @torch.no_grad()
    def features(self, videos: Videos, layers: Sequence[int] | None = None) -> Features:
        """Features of unmasked clips.

        Args:
            videos: a path, uint8 frames (T, H, W, 3) or (B, T, H, W, 3) of any number, size and device, or a list of paths
                and of decoded clips.
            layers: numbers of blocks whose outputs are wanted too, from 0; negative ones count from the last, -1.

        Raises:
            DataError: a file that cannot be read, float or empty frames, another shape.
            ConfigError: a layer that does not exist.
        """
        depth = len(self.tower.blocks)
        require(not isinstance(layers, int), f"layers is {layers!r}; give a list: layers=[{layers!r}]")
        for layer in layers or ():
            require(
                isinstance(layer, int) and -depth <= layer < depth,
                f"layer {layer!r} does not exist; this tower has blocks 0 to {depth - 1}",
            )
        numbers = {layer: layer % depth for layer in layers or ()}
        with self._autocast():
            outputs = self._outputs(self.pixels(videos), depth - min([*numbers.values(), depth - 1]))
            tokens, pooled = self._finish(outputs[-1])
        found = {layer: self._grid(outputs[number - depth]) for layer, number in numbers.items()}
        return Features(pooled.float(), self._grid(tokens), found)

    def vectors(self, videos: Videos) -> dict[str, Tensor]:
        """One vector of a kind for each clip: `pooled` (B, C) as in features and, of stage 2, `embedding` (B, E)."""
        return self.vectors_of_pixels(self.pixels(videos))

    def vectors_of_pixels(self, pixels: Tensor) -> dict[str, Tensor]:
        """The same of pixels as encode_pixels takes them."""
        return {"pooled": self.encode_pixels(pixels)[1]}

    def fingerprint(self) -> str:
        """Tells weights apart: a hash of every tensor's name, shape and about 64 of its values."""
        seen = []
        for name, value in sorted(self.network.state_dict().items()):
            flat = value.detach().flatten().float()
            sample = flat[:: max(1, len(flat) // 64)].cpu().numpy()
            seen.append(f"{name} {tuple(value.shape)}".encode() + np.ascontiguousarray(sample).tobytes())
        return checksum(seen)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute == "bf16")

    def _outputs(self, video: Tensor, count: int) -> list[Tensor]:
        # A classifier is a tower itself, and its own forward goes on to the classes.
        return VisionTransformer.forward(self.tower, video, None, count)

    @abstractmethod
    def _finish(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last block's output (B, n, C) -> tokens of the same shape, pooled (B, C)."""

    def _grid(self, tokens: Tensor) -> Tensor:
        grid = self.tower.grid
        return tokens.float().unflatten(1, (grid.frames, grid.rows, grid.columns))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of a model that reads texts, loaded when it is first needed."""
        if "_loaded_words" not in self.__dict__:
            require(
                bool(self.words.name),
                "which tokenizer this model was trained with is not known; give it: tokenizer= (search: --tokenizer)",
            )
            found, limit = load_vocabulary(self.words), self.description["text"]["vocab_size"]
            require(
                len(found) <= limit,
                f"the tokenizer {self.words.name} has {len(found)} words, but the model knows {limit}; give its own",
            )
            self.__dict__["_loaded_words"] = found
        return self.__dict__["_loaded_words"]

    # Folders and repositories

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes config.json, model.safetensors and a README.md; options as ModelHubMixin has them.

        Raises ConfigError: there is a file of that name. WeightsError: it cannot be written.
        """
        require(str(save_directory) != "", "save_directory is empty; give the name of a folder")
        require(not Path(save_directory).is_file(), f"{save_directory} is a file; give the name of a folder")
        name = self.words.name
        if self.words.definition or name.count("/") > 1 or name.startswith((".", "/")) or Path(name or "?").exists():
            # No name of the Hub: it has to go along, and without it the model could read no text elsewhere.
            load_vocabulary(self.words)
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        words = self.words
        # A name alone stays a name; a folder or file of this machine has to go along.
        if words.definition or (words.name and Path(words.name).exists()):
            tokenizer = load_vocabulary(words)
            tokenizer.save_pretrained(save_directory)
            words = vocabulary_of(tokenizer, words.name)
        # The weights carry it too, for those who take that file alone.
        save_state(self._state(), save_directory / WEIGHTS, self.description, words if words.name else None)
        words = words._replace(name=".") if words.definition else words
        write_json(save_directory / CONFIG, self.description | folder_record(words), indent=2)

    def _state(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: Dtype | None = None,
        **options: Any,
    ) -> PretrainedModel:
        """The model of a folder that save_pretrained wrote, or of a repository that push_to_hub filled.

        Args:
            device, dtype: see hub.load_model.
            options: revision, token, cache_dir, force_download and local_files_only, as ModelHubMixin has them.

        Raises:
            WeightsError: no such folder or repository, or nothing of umt_fast in it.
            ConfigError: it holds a model of another kind than this class.
        """
        source = str(pretrained_model_name_or_path)
        if Path(source).is_file():
            raise WeightsError(f"{source} is a file; load it by load_model(weights={source!r})")
        if Path(source).is_dir() and not is_saved_folder(Path(source)):
            raise WeightsError(f"{source} holds no {CONFIG}; give a folder that save_pretrained wrote")
        try:
            return super().from_pretrained(source, device=device, dtype=dtype, **options)
        except (WeightsError, ConfigError, DataError):
            raise
        except json.JSONDecodeError as error:
            raise WeightsError(f"{source}/{CONFIG} is no JSON; give a folder that save_pretrained wrote") from error
        except (OSError, ValueError) as error:  # the hub client has its own tree of errors; JSON's are ValueErrors
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise WeightsError(f"no model can be had from {source}, as a folder or a repository: {reason}") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: str | torch.device,
        dtype: Dtype | None,
    ) -> PretrainedModel:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[CONFIG, WEIGHTS, *_TOKENIZER_FILES],
                )
            )
        if not is_saved_folder(folder):
            raise WeightsError(f"{model_id} holds no {CONFIG}; give what save_pretrained or push_to_hub wrote")
        state, rest = read_weights(folder)
        described, words = found_in(rest, folder / CONFIG), vocabulary_in(rest)
        model = build(described, state, str(folder / WEIGHTS), device=device, dtype=dtype, words=words)
        require(isinstance(model, cls), f"{model_id} is a {type(model).__name__}, no {cls.__name__}")
        return model


def build(
    description: dict[str, Any],
    state: dict[str, Tensor] | None,
    source: str,
    *,
    device: str | torch.device = "auto",
    dtype: Dtype | None = None,
    words: Vocabulary | None = None,
) -> PretrainedModel:
    """The model of a complete description with the weights of `state`; None: random ones.

    Raises ConfigError: a kind of model that is not built, a wrong device or dtype. WeightsError: weights that do not fit.
    """
    task = description["task"]
    require(task in CLASSES, f"{source} is of task {task!r}; models of {', '.join(CLASSES)} are built")
    cls = CLASSES[task]
    usual = description["dtype"] if "num_classes" in description else "fp32"  # as each is judged by `eval`
    require(
        dtype is None or dtype in DTYPES, f"dtype is {dtype!r}; give 'bf16', 'fp32', torch.bfloat16 or torch.float32"
    )
    place = device_of(device)
    network = cls.empty(description)
    if state is not None:
        cls.fill(network, state, source)
    compute = DTYPES[usual if dtype is None else dtype]
    return cls(network, description, compute=compute, words=words).to(place)
