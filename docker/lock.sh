#!/usr/bin/env bash
# Writes the lock files of the images anew from setup.py, with the newest versions that fit. Needs uv.
#
#   docker/lock.sh [option of "uv pip compile" ...]
#
# The CPU image needs torch's CPU wheels, which PyPI does not have: name PyTorch's index of them, or a folder. Python
# 3.11 is Debian 12's; what is chosen for it also holds for Ubuntu 24.04's 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compile() {
    local variant=$1
    shift
    uv pip compile setup.py - --quiet --upgrade --no-annotate --no-emit-find-links --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --custom-compile-command "docker/lock.sh" \
        --output-file "docker/requirements-$variant.lock" "$@"
}
echo | compile cuda --extra mpi --extra dali "$@"
echo "torch==2.13.0+cpu" | compile cpu --extra mpi "$@"
