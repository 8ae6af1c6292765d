# Sourced by the other recipes: finds or makes the environment and sets PYTHON.
#
#   UMT_PYTHON=/path/to/python   use this interpreter as it is (it must have torch, open_clip, ...); nothing is installed
#   an active environment        (venv or conda) is used if it has the packages in NEEDS; one line says so, or what it lacks
#   otherwise                    use .venv in the repository, made from constraints.txt when missing or out of date
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

make_environment() {
    local base=${PYTHON3:-python3} stamp
    stamp=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | sha256sum | cut -d' ' -f1)
    # The stamp is written last, so an installation cut short is done again.
    if [ "$(cat "$ROOT/.venv/installed" 2>/dev/null)" != "$stamp" ]; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "umt_fast needs Python 3.11 or newer; $base is $("$base" --version 2>&1). Set PYTHON3=/path/to/a/newer/python3." >&2
            return 1
        }
        echo "Making $ROOT/.venv (once; about 6 GB, two minutes on a fast connection) ..." >&2
        rm -f "$ROOT/.venv/installed"
        "$base" -m venv "$ROOT/.venv" &&
            "$ROOT/.venv/bin/python" -m pip install -q --no-compile -c "$ROOT/constraints.txt" -e "$ROOT[test]" &&
            # Compiling all 12,000 files would take longer than importing, once, those that are used.
            PYTHONDONTWRITEBYTECODE='' "$ROOT/.venv/bin/python" -c 'import open_clip, transformers.models.bert, pytest' &&
            echo "$stamp" >"$ROOT/.venv/installed" || return 1
    fi
    PYTHON="$ROOT/.venv/bin/python"
}

# Sets PYTHON to the active environment's, or returns 1.
active_environment() {
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} lacks
    if [ -z "$active" ] || [ "$active" -ef "$ROOT/.venv" ] || [ ! -x "$active/bin/python" ]; then
        return 1
    fi
    lacks=$("$active/bin/python" - "$@" <<'EOF'
import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None], sep=", ")
EOF
    ) || return 1
    if [ -n "$lacks" ]; then
        echo "The active environment $active lacks $lacks; using $ROOT/.venv in its place." >&2
        return 1
    fi
    echo "Using the active environment $active" >&2
    PYTHON="$active/bin/python"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

if [ -n "${UMT_PYTHON:-}" ]; then
    PYTHON=$UMT_PYTHON
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
elif ! active_environment ${NEEDS:-torch open_clip transformers av tyro tensorboard}; then
    make_environment || exit 1
fi
