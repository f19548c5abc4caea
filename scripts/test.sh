#!/usr/bin/env bash
# Sets up where needed, then checks format, lint and types and runs all tests. All stages run even if one fails.
#
#   scripts/test.sh [pytest arguments]      such as -k config, or -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

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
stage tests .venv/bin/python -m pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All stages passed."
