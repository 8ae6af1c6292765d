"""Whole stage-1 steps side by side in one process: `python -m benchmarks.steps MODEL OUT.jsonl [BATCH ...]`.

At each batch size the fast road, the plain road, and the fast road compiled; each line is one of `bench stage1`, written as
soon as it is there. What does not fit is on record with its error. UMT_ROADS="fast plain" leaves the compiled one out.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
import traceback

import torch

from umt_fast.bench import stage1

GPU = torch.cuda.is_available()
ROADS = {
    "fast": {"road": "fast"},
    "plain": {"road": "plain"},
    "compiled": {"road": "fast", "compile": True},
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
    except Exception as error:
        # One road that fails must not take the others' figures with it.
        traceback.print_exc()
        return {"model": model, "batch_size": batch, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def main(model: str, out: str, *batches: str) -> None:
    roads = os.environ.get("UMT_ROADS", " ".join(ROADS)).split()
    with open(out, "w") as file:
        # The compiled road last: it takes minutes to compile, and a run cut short keeps what it had.
        for name in roads:
            for batch in map(int, batches or ("16", "64", "128")):
                row = line(model, batch, name) | {"name": name}
                print(json.dumps(row), file=file, flush=True)
                print(f"{model}, {batch} clips, {name}: {row.get('clips_per_s', row.get('error'))} clips/s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
