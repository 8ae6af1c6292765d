"""Our models of downstream tasks, filled from parity files (see parity_files)."""

from __future__ import annotations

from torch import Tensor, nn

from tests.parity_files import relative, tower_of
from umt_fast.config import TextConfig, VitConfig

LIMIT = 1e-4


def sizes_of(config: dict, tensors: dict[str, Tensor]) -> tuple[VitConfig, TextConfig]:
    """The sizes of a downstream file's tower and text encoder; nothing is dropped."""
    vit = tower_of(config)
    embeddings = "text_encoder.embeddings."
    text = TextConfig(
        width=tensors[f"{embeddings}word_embeddings.weight"].shape[1],
        depth=config["layers"],
        fusion_layer=config["fusion"],
        num_heads=config["theads"],
        vocab_size=config["vocab"],
        max_positions=tensors[f"{embeddings}position_embeddings.weight"].shape[0],
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return vit, text


def state_of(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The parameters among a file's tensors, in the model's shapes."""
    parts = ("vision_encoder.", "text_encoder.", "text_decoder.", "vision_proj.", "text_proj.", "itm_head.", "temp")
    own = model.state_dict()
    return {
        key: value.view(own[key].shape) if key in own else value
        for key, value in tensors.items()
        if key.startswith(parts)
    }


def compare_gradients(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Every gradient of the file against the model's; every parameter of the model is in the file."""
    own = dict(model.named_parameters())
    theirs = {key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")}
    assert theirs.keys() >= own.keys(), own.keys() - theirs.keys()
    assert all(key in own for key in theirs), theirs.keys() - own.keys()
    largest = max(value.norm().item() for value in theirs.values())
    for key, expected in theirs.items():
        gradient = own[key].grad
        if expected.norm() < 1e-6 * largest:  # a key bias: zero but for rounding
            assert gradient is None or gradient.norm() < 1e-5 * largest, key
        else:
            assert relative(gradient, expected.view_as(gradient)) < LIMIT, key
