"""What official fine-tuning starts from: a stage-1 model, or a classifier of other classes, frames or picture size.

The official code prints what does not fit and goes on, so that a head of the wrong size stays random. Here the same tensors
arrive, whatever is left out is named in a line, and a head that does not fit is refused unless it is to be deleted.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from umt_fast.config import VitConfig
from umt_fast.masking import TokenGrid
from umt_fast.models.classifier import Classifier, pretraining_grid
from umt_fast.models.vit import position_table, resized_table
from umt_fast.models.weights.files import WeightsError, is_saved_folder, load_state
from umt_fast.models.weights.layouts import fit

log = logging.getLogger("umt_fast.weights")

K710_CLASSES = 710
K400_CLASSES = 400
_MAPPED = (600, 700)
_PRETRAINING_FRAMES = 8
_HEAD = ("head.weight", "head.bias")
# Entries of stage-1 files that a classifier has no place for: heads of the alignment, and the norm that pooling replaces.
_UNUSED = ("clip_decoder.", "norm.")
_MODEL_STATES = "mp_rank_*_model_states.pt"


class Started(NamedTuple):
    """Names in the classifier's layout. used: copied from the file, cut or resized where needed. fresh: not in the file, at
    their initial values. unused: in the file and left there."""

    used: list[str]
    fresh: list[str]
    unused: list[str]


def start_classifier(
    classifier: Classifier, path: str | Path, *, delete_head: bool = False, label_map: str | Path = ""
) -> Started:
    """Fills a classifier from a stage-1 or classifier file, or from a deepspeed checkpoint folder.

    Args:
        delete_head: the file's head is not used; ours starts fresh.
        label_map: JSON list for a head of 710 rows and 600 or 700 classes; see read_label_map.

    Raises:
        WeightsError: unreadable, other sizes, a head of other classes, a position table that cannot be told.
    """
    source = deepspeed_file(path)
    return start_from_state(classifier, load_state(source), str(source), delete_head=delete_head, label_map=label_map)


def start_from_state(
    classifier: Classifier,
    state: dict[str, Tensor],
    source: str,
    *,
    delete_head: bool = False,
    label_map: str | Path = "",
) -> Started:
    """start_classifier of tensors that were read already; `source` is named in messages."""
    state = {key.removeprefix("encoder.").removeprefix("backbone."): value for key, value in state.items()}
    unused = []
    if delete_head:
        unused = [key for key in _HEAD if key in state]
        log.info("%s: the head is deleted and starts fresh", source)
    elif _HEAD[0] in state:
        classes = classifier.head.out_features
        rows = head_rows(len(state[_HEAD[0]]), classes, source, label_map)
        if rows is not None:
            log.info("%s: the head's %d rows become %d", source, len(state[_HEAD[0]]), classes)
            state |= {key: state[key][rows] for key in _HEAD}
    state = {key: value for key, value in state.items() if key not in unused}
    table = state.pop("pos_embed", None)
    # Before anything is copied: a file that is refused leaves the model as it was.
    positions = None if table is None else _positions(classifier, table, source)
    own = classifier.state_dict()
    without_head = _HEAD[0] not in state
    fresh = [key for key in own if key not in state and key.startswith(("fc_norm.", "head."))] if without_head else []
    unused += [key for key in state if key.startswith(_UNUSED)]
    fit(classifier, state, source, fresh=fresh, dropped=_UNUSED)
    used = [key for key in state if key in own]
    if positions is not None:
        classifier.position.copy_(positions)
    if table is not None:
        (unused if positions is None else used).append("pos_embed")
    return Started(used, fresh, unused)


def head_rows(stored: int, classes: int, source: str, label_map: str | Path = "") -> Tensor | None:
    """Which rows of a stored head a new one of `classes` takes, int64 (classes,); None: all, as they are.

    A K710 head gives K400 its first 400 rows, and K600 or K700 the rows of a label map.

    Raises WeightsError: another number of classes, a missing or damaged map, a map that nothing needs.
    """
    mapped = stored == K710_CLASSES and classes in _MAPPED
    if label_map and not mapped:
        raise WeightsError(
            f"a label map is for a head of {K710_CLASSES} rows and 600 or 700 classes, but {source} has {stored} rows and the "
            f"model {classes} classes; leave it out"
        )
    if stored == classes:
        return None
    if stored == K710_CLASSES and classes == K400_CLASSES:
        return torch.arange(K400_CLASSES)
    if not mapped:
        raise WeightsError(
            f"{source} has a head of {stored} classes and the model one of {classes}; start a new head "
            f"(--init_as new_head), or train {stored} classes (--num_classes {stored})"
        )
    if not label_map:
        raise WeightsError(
            f"{source} has a head of {K710_CLASSES} classes; to start one of {classes} from it, give the label map "
            f"(--label_map, a launcher: LABEL_MAP; label_mixto{classes}.json of the official release), or start a new head "
            "(--init_as new_head)"
        )
    return torch.tensor(read_label_map(label_map, classes))


def read_label_map(path: str | Path, classes: int) -> list[int]:
    """A JSON list that has a K710 row for each class. Raises WeightsError: unreadable, or not such a list."""
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise WeightsError(f"the label map {path} cannot be read: {reason}") from error
    if not isinstance(rows, list) or len(rows) != classes:
        length = f"a list of {len(rows)}" if isinstance(rows, list) else "no list"
        raise WeightsError(f"the label map {path} is {length}; it must be a list of {classes} rows, one for each class")
    wrong = [row for row in rows if type(row) is not int or not 0 <= row < K710_CLASSES]
    if wrong:
        raise WeightsError(
            f"the label map {path} names the row {wrong[0]!r}; rows are integers from 0 to {K710_CLASSES - 1}"
        )
    return rows


def resized_positions(table: Tensor, grid: TokenGrid, tubelet: int = 1) -> Tensor:
    """A stored position table (1, N, C) for a grid of tokens, fp32 (grid.size, C): linear over time, bicubic within a frame.

    A table of the grid's own length is taken as it is. Any other is taken for one of 8 frames and square pictures, as the
    official code takes all.

    Raises WeightsError: it cannot be one.
    """
    count = table.shape[-2]
    frames = _PRETRAINING_FRAMES // tubelet
    side = math.isqrt(count // frames)
    if count == grid.size:
        return table[0].float()
    if frames * side * side != count:
        raise WeightsError(
            f"the stored position table has {count} rows, which is neither the {grid.size} of this model nor {frames} token "
            "frames of a square picture; leave pos_embed out of the file to use the built table"
        )
    return resized_table(table[0].float(), TokenGrid(frames, side, side), grid)


def _positions(classifier: Classifier, table: Tensor, source: str) -> Tensor | None:
    """A stored table for the classifier's clip. None: it keeps the one it was built with, as the official model of
    pre-training's own number of tokens does, which has no place for another."""
    width, grid, config = classifier.position.shape[1], classifier.grid, classifier.config
    if table.ndim != 3 or len(table) != 1 or table.shape[-1] != width:
        raise WeightsError(f"{source} has a position table of shape {tuple(table.shape)}; it must be (1, N, {width})")
    try:
        found = resized_positions(table, grid, config.tubelet_size)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    if grid.size == TokenGrid(*config.position_grid).size:
        log.info("%s: pos_embed not used: a model of %d tokens keeps the table it was built with", source, grid.size)
        return None
    if table.shape[1] != grid.size:
        log.info("%s: pos_embed resized from %d to %d rows", source, table.shape[1], grid.size)
    return found


def with_positions(state: dict[str, Tensor], vit: VitConfig) -> dict[str, Tensor]:
    """A classifier's state as the official layout has it: with the position table, `pos_embed` (1, N, C), of a clip that has
    not as many tokens as the pre-training's. A state that has one is left alone."""
    own = vit.position_grid or pretraining_grid(vit.patch_size)
    if "pos_embed" in state or TokenGrid(*vit.grid).size == TokenGrid(*own).size:
        return state
    return state | {"pos_embed": position_table(replace(vit, position_grid=own))[None]}


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is a deepspeed checkpoint, or has the `latest` that names one."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob(_MODEL_STATES)))


def deepspeed_file(path: str | Path) -> Path:
    """The file of parameters in a deepspeed checkpoint folder, or in the folder that its `latest` names; files, and folders
    that save_pretrained wrote, as they are.

    Raises WeightsError: a folder without such a file, or one whose parameters are split over several.
    """
    path = Path(path)
    if not path.is_dir() or is_saved_folder(path):
        return path
    latest = path / "latest"
    folder = path / latest.read_text().strip() if latest.is_file() else path
    parts = sorted(folder.glob(_MODEL_STATES))
    if len(parts) != 1:
        found = f"{len(parts)} files of parameters: a model split over devices" if parts else f"no {_MODEL_STATES}"
        raise WeightsError(f"{folder} holds {found}; give a deepspeed checkpoint folder with one, or a weights file")
    return parts[0]
