"""What each objective of stage 2 gives, in the sample world: `python -m benchmarks.objectives runs/quickstart`.

Takes a finished quickstart, trains its stage 2 once with all objectives and once without each of them (paper Table 6 in
miniature), and prints zero-shot retrieval on unseen clips as a Markdown table. Runs that are there are not trained again.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from umt_fast import quickstart
from umt_fast.train import train

VARIANTS = {"all four": None, "without VTC": "vtc", "without VTM": "vtm", "without MLM": "mlm", "without UTA": "uta"}


def measure(folder: Path, seed: int, off: str | None) -> dict[str, float]:
    """Zero-shot retrieval of the quickstart's stage 2 with one objective switched off (None: none)."""
    config = quickstart.stage2_config(folder, seed, quickstart.newest_weights(folder / "stage1"))
    config.run.out = str(folder / f"stage2_without_{off}" if off else folder / "stage2")
    if off:
        setattr(config.losses, off, 0.0)
    train(config)
    return quickstart.retrieve(folder, config, show=0)


def main(folder: Path) -> str:
    """The table, a row for each variant."""
    seed = json.loads((folder / "results.json").read_text())["seed"]
    quickstart.write_vocabulary(folder / "tokenizer", folder / "world" / "train_captions.json")
    heads = [(f"{how}_{way}_r1", f"{text} R@1") for how, text in (("dual", "embeddings"), ("match", "re-ranked"))
             for way in ("t2v", "v2t")]  # fmt: skip
    lines = [["objectives", *(f"{text}, {key.split('_')[1]}" for key, text in heads)], ["---"] * (1 + len(heads))]
    for name, off in VARIANTS.items():
        found = measure(folder, seed, off)
        lines.append([name, *(f"{100 * found[key]:.1f}%" for key, _ in heads)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main(Path(sys.argv[1])))
