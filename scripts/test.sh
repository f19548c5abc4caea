#!/usr/bin/env bash
# Sets up where needed, then checks format, lint and types, builds the site, and runs all tests. All stages run even if one fails.
# Without arguments there are two runs of pytest side by side, since neither keeps two cores busy; one's output comes last.
#
#   scripts/test.sh [pytest arguments]      such as -k config, or -m "not slow"
#
# Tests on real data use the folder that KFAC_DIST_DATA names. Where that is not set, and a folder beside this checkout
# holds data/unpack.py (called as: unpack.py NAME FOLDER), its data are unpacked once into the user's cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --try dali
scripts/setup_cluster_tests.sh # here and not in the tests: pytest on its own installs nothing

unpack_real_data() {
    local unpack name cache="${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/kfac_dist/test-data"
    for unpack in ../*/data/unpack.py; do
        [ -f "$unpack" ] || continue
        mkdir -p "$cache" || return 0
        for name in cifar10 imagenette-mini imagenet-photos; do
            [ -e "$cache/.$name" ] && continue
            echo "== data: unpacking $name into $cache"
            if .venv/bin/python "$unpack" "$name" "$cache" >/dev/null; then
                touch "$cache/.$name"
            else
                echo "warning: $unpack could not unpack $name: tests that need it are skipped" >&2
            fi
        done
        export KFAC_DIST_DATA="$cache"
        return 0
    done
}
[ -n "${KFAC_DIST_DATA:-}" ] || unpack_real_data

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # small tensors, and several processes at once
failed=()
stage() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" || failed+=("$name")
}
stage format .venv/bin/ruff format --check .
stage lint .venv/bin/ruff check .
stage types .venv/bin/mypy
stage site env NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict # --quiet would count no warnings
print_when_done() { # process, its output
    local code=0
    wait "$1" || code=$?
    cat "$2"
    return "$code"
}
if [ $# -gt 0 ]; then
    stage tests .venv/bin/python -m pytest "$@"
else
    output=$(mktemp)
    .venv/bin/python -m pytest tests/cluster tests/gpu tests/system >"$output" 2>&1 &
    beside=$!
    end_the_other_run() {
        if kill -INT "$beside" 2>/dev/null; then wait "$beside" || true; fi # it stops what it has started
        rm -f "$output"
    }
    trap 'end_the_other_run; exit 130' INT TERM
    stage "tests of the package" .venv/bin/python -m pytest --ignore=tests/cluster --ignore=tests/gpu --ignore=tests/system
    stage "tests of commands, cluster and GPU" print_when_done "$beside" "$output"
    trap - INT TERM
    rm -f "$output"
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All stages passed."
