"""Whole stage-1 steps side by side in one process: `python -m benchmarks.steps MODEL OUT.jsonl [BATCH ...]`.

For each batch size the fast road, the fast road compiled, and the plain road; each line is one of `bench stage1`, written as
soon as it is there. What does not fit is on record with its error. UMT_ROADS="fast plain" leaves the compiled one out.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys

import torch

from umt_fast.bench import stage1

GPU = torch.cuda.is_available()
ROADS = {
    "fast": {"road": "fast"},
    "compiled": {"road": "fast", "compile": True},
    "plain": {"road": "plain"},
}


def line(model: str, batch: int, name: str) -> dict[str, object]:
    """The figures of one road, or the error that kept it from running."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            stage1.main(
                model=model, batch_size=batch, dtype="bf16" if GPU else "fp32", steps=10 if GPU else 2, **ROADS[name]
            )
        return json.loads(printed.getvalue().splitlines()[-1])
    except torch.OutOfMemoryError:
        return {"model": model, "batch_size": batch, "error": "out of memory"}
    finally:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def main(model: str, out: str, *batches: str) -> None:
    roads = os.environ.get("UMT_ROADS", " ".join(ROADS)).split()
    with open(out, "w") as file:
        for batch in map(int, batches or ("16", "64", "128")):
            for name in roads:
                row = line(model, batch, name) | {"name": name}
                print(json.dumps(row), file=file, flush=True)
                print(f"{model}, {batch} clips, {name}: {row.get('clips_per_s', row.get('error'))} clips/s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
