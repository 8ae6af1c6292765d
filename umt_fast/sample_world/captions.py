"""Retrieval and multiple choice in the sample world: what fine-tuning adds to stage 2.

    python -m umt_fast.sample_world.captions runs/quickstart

goes on from a quickstart with `--stage2`: writes the lists, judges the stage-2 weights on unseen clips as they are,
fine-tunes them for retrieval and for multiple choice, keeping the best epoch by clips that neither trains on, and judges
those. Settings: recipes/quickstart.py:retrieval and :choices.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umt_fast import recipe
from umt_fast.config import ConfigError, RetrievalConfig
from umt_fast.engine.distributed import current_ranks
from umt_fast.files import write_json
from umt_fast.sample_world import world as sample_world
from umt_fast.sample_world.quickstart import Results, newest_weights
from umt_fast.tasks.choosing import ChooseOptions
from umt_fast.tasks.evaluate import evaluate_checkpoint
from umt_fast.tasks.retrieve import RetrieveOptions
from umt_fast.train import train

log = logging.getLogger("umt_fast")

# Training clips that are kept back: the best epoch is chosen by them.
HELD_OUT = 240
_CHANGED = ("color", "pattern", "direction", "background")
_VALUES = {
    "color": tuple(sample_world.COLORS),
    "pattern": sample_world.PATTERNS,
    "direction": tuple(sample_world.DIRECTIONS),
    "background": sample_world.BACKGROUNDS,
}


def options_of(scene: sample_world.Scene, rng: np.random.Generator) -> tuple[list[str], int]:
    """Five captions in a random order and the place of the right one: each of the others has one word that is wrong."""
    texts = [scene.caption]
    for kind in _CHANGED:
        thing = scene.thing
        own = {"pattern": scene.pattern, "background": scene.background}.get(kind) or getattr(thing, kind)
        other = str(rng.choice([value for value in _VALUES[kind] if value != own]))
        if kind in ("pattern", "background"):
            texts.append(replace(scene, **{kind: other}).caption)
        else:
            texts.append(replace(scene, thing=replace(thing, **{kind: other})).caption)
    order = rng.permutation(len(texts))
    return [texts[number] for number in order], int(order.argmin())


def write_lists(world: Path, seed: int) -> dict[str, Any]:
    """Writes retrieval_{train,held_out}.json and choices_{held_out,test}.json beside the world's own lists; counts them."""
    entries = json.loads((world / "train_captions.json").read_text())
    first: dict[str, dict[str, str]] = {}
    for entry in entries[-HELD_OUT:]:
        first.setdefault(entry["caption"], entry)  # every caption has one right answer, as among unseen clips
    lists = {"retrieval_train": entries[:-HELD_OUT], "retrieval_held_out": list(first.values())}
    rng = np.random.default_rng((seed, 5))
    for name, split, rows in (("held_out", "train", slice(-HELD_OUT, None)), ("test", "test", slice(None))):
        scenes = sample_world.read_scenes(world, split)
        numbers = range(len(scenes))[rows]
        lists[f"choices_{name}"] = []
        for number in numbers:
            texts, answer = options_of(scenes[number], rng)
            entry = {"video": f"{split}/{number:05d}.mp4", "caption": texts, "answer": answer}
            lists[f"choices_{name}"].append(entry)
    for name, content in lists.items():
        write_json(world / f"{name}.json", content)
    return {name: len(content) for name, content in lists.items()}


def config_of(out: Path, seed: int, variant: str) -> RetrievalConfig:
    """The page's run of a variant, `retrieval` or `choices`, on this world and its stage-2 weights."""
    config: RetrievalConfig = recipe.load(f"quickstart:{variant}")
    config.run.seed, config.run.out = seed, str(out / variant)
    world = out / "world"
    config.videos = (str(world / "retrieval_train.json"),)
    config.data.prepared = (str(out / "prepared" / "train_captions"),)
    config.data.validation = str(world / f"{variant}_held_out.json")
    config.init, config.tokenizer = newest_weights(out / "stage2"), str(out / "tokenizer")
    return config


def judged(out: Path, weights: Path, config: RetrievalConfig) -> dict[str, float]:
    """Retrieval and multiple choice of some weights on unseen clips."""
    ranks, workers, world = current_ranks(config.run), config.data.workers, out / "world"
    words, size = str(out / "tokenizer"), 32
    options = RetrieveOptions(batch_size=size, workers=workers, tokenizer=words)
    found = evaluate_checkpoint("retrieve", weights, world / "test_captions.json", ranks=ranks, options=options)
    options = ChooseOptions(batch_size=size, workers=workers, tokenizer=words)
    chosen = evaluate_checkpoint("choose", weights, world / "choices_test.json", ranks=ranks, options=options)
    return {name: round(value, 4) for name, value in (found | {"choices_accuracy": chosen["accuracy"]}).items()}


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures side by side, in per cent."""
    names = ("dual_t2v_r1", "match_t2v_r1", "match_v2t_r1", "match_r_mean", "choices_accuracy")
    lines = [f"{'':<18}" + "".join(f"{name:>14}" for name in figures)]
    lines += [f"{name:<18}" + "".join(f"{100 * its[name]:>14.1f}" for its in figures.values()) for name in names]
    return "\n".join(lines)


def run(out: Path) -> dict[str, dict[str, float]]:
    """Does what is missing and returns the figures of stage 2's weights and of both that were fine-tuned."""
    results = Results(out)
    seed = results.seed
    if "stage2" not in results.values:
        raise ConfigError(f"{out} has no stage 2; run the quickstart with --stage2 --out {out} first")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # models this small gain nothing from a second core
    results.part("caption lists", lambda: write_lists(out / "world", seed))
    first = config_of(out, seed, "retrieval")
    figures = {"stage 2": results.part("captions of stage2", lambda: judged(out, Path(first.init), first))}
    for variant in ("retrieval", "choices"):
        config = config_of(out, seed, variant)
        results.part(f"{variant} tuned", lambda config=config: {"run": str(train(config))})
        best = Path(config.run.out) / "checkpoint-best.pt"
        judge = results.part(f"captions of {variant}", lambda best=best, config=config: judged(out, best, config))
        figures[variant] = judge
    return figures


def main(arguments: list[str]) -> int:
    """The command; see the module's head."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m umt_fast.sample_world.captions FOLDER\nFOLDER: of a quickstart with --stage2")
        return 0 if arguments else 2
    try:
        print(table(run(Path(arguments[0]))))
    except ConfigError as error:
        print(f"umt_fast: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
