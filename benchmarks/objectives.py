"""What each objective of stage 2 gives, in the sample world: `python -m benchmarks.objectives runs/quickstart [EPOCHS]`.

Takes a finished `quickstart --stage2`, trains its stage 2 once with all objectives and once without each of them (paper
Table 6 in miniature), and prints zero-shot retrieval on unseen clips as a Markdown table. A table cut short goes on.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from umt_fast.sample_world import quickstart
from umt_fast.train import train

VARIANTS = {"all four": None, "without VTC": "vtc", "without VTM": "vtm", "without MLM": "mlm", "without UTA": "uta"}


def measure(folder: Path, seed: int, off: str | None, epochs: int) -> dict[str, float]:
    """Zero-shot retrieval of the quickstart's stage 2 with one objective switched off (None: none)."""
    config = quickstart.stage2_config(folder, seed, quickstart.newest_weights(folder / "stage1"))
    config.run.epochs = epochs or config.run.epochs
    config.run.out = str(folder / f"objectives_{config.run.epochs}" / f"without_{off or 'none'}")
    if off:
        setattr(config.losses, off, 0.0)
    train(config)
    return quickstart.retrieve(folder, config, show=0)


def main(folder: Path, epochs: int = 0) -> str:
    """The table, a row for each variant; epochs 0: as many as the quickstart's page says."""
    seed = json.loads((folder / "results.json").read_text())["seed"]
    heads = [
        (f"{how}_{way}_r1", f"{text} R@1")
        for how, text in (("dual", "embeddings"), ("match", "re-ranked"))
        for way in ("t2v", "v2t")
    ]
    lines = [["objectives", *(f"{text}, {key.split('_')[1]}" for key, text in heads)], ["---"] * (1 + len(heads))]
    with quickstart.side_by_side() as pool:
        runs = {name: pool.submit(measure, folder, seed, off, epochs) for name, off in VARIANTS.items()}
        for name, run in runs.items():
            found = run.result()
            lines.append([name, *(f"{100 * found[key]:.1f}%" for key, _ in heads)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
