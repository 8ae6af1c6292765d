#!/usr/bin/env bash
# Tests the lowest versions that pyproject.toml declares: `bash recipes/lower_bounds.sh [pytest arguments]`.
#
# Makes an environment in a temporary folder (about 6 GB, deleted at the end; KEEP=DIR makes it in DIR and keeps it), with each
# `X>=V` of the package and its extras `all` and `test` as `X==V`, then runs the tests named below, or those that are given.
# PYTHON3 names the interpreter; use the oldest one that the package supports. flash-attn and xformers are left out: one is
# a build from source, the other is made for one version of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${PYTHON3:-python3}
folder=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$folder"' EXIT

"$base" -m venv "$folder"
"$base" - >"$folder/lowest.txt" <<'PROGRAM'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]

def lowest(entries):
    for entry in entries:
        name, _, rest = entry.partition(";")
        own = re.match(r"umt_fast\[([\w,-]+)\]", name)
        if own:
            for extra in own[1].split(","):
                yield from lowest(extras[extra])
            continue
        bound = re.match(r"\s*([\w.-]+)>=([\w.]+)", name)
        if not bound:
            raise SystemExit(f"{entry!r} declares no lowest version; write NAME>=VERSION")
        yield f"{bound[1]}=={bound[2]}" + (f" ;{rest}" if rest else "")

print("\n".join(dict.fromkeys([*lowest(project["dependencies"]), *lowest(extras["test"])])))
PROGRAM
echo "The lowest versions declared, with $("$base" --version):" >&2
cat "$folder/lowest.txt" >&2
"$folder/bin/python" -m pip install -q --no-compile -r "$folder/lowest.txt"

# The everyday tests of what touches these packages: kernels, parity with the official code, data, a run and its continuation,
# the Python API, the commands.
if [ $# = 0 ]; then
    set -- -m "not slow" tests/kernels tests/models tests/reference tests/config tests/data tests/objectives tests/tasks \
        tests/engine/test_trainer.py tests/engine/test_optim.py tests/test_hub.py tests/test_cli.py
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD"
"$folder/bin/python" -m pytest -q -n auto --dist worksteal "$@"
