# shellcheck shell=bash
# What the batch scripts of this folder share: the cluster's settings, the launcher, signals and requeue. They source it
# with `home` set to the checkout. docs/cluster.md says what the variables KFAC_DIST_* mean.

say() { echo "${SLURM_JOB_NAME:-job} ${SLURM_JOB_ID:-}: $*"; }
die() { say "error: $*" >&2; exit 2; }

# Sources the cluster's own settings, and says what may be wrong with them.
load_settings() {
    unset SLURM_EXPORT_ENV # of `sbatch --export=NONE`: srun, and so mpirun's daemons, would start without PATH
    [ -z "${SLURM_HET_SIZE:-}" ] || die "a heterogeneous job's ranks are of its first component only: submit one without \":\""
    local site="${KFAC_DIST_SITE:-$home/scripts/slurm/site.sh}"
    if [ -f "$site" ]; then
        set +eu # `module` and conda's scripts do not stand them
        # shellcheck source=/dev/null
        source "$site"
        set -eu
    elif [ -n "${KFAC_DIST_SITE:-}" ]; then
        die "KFAC_DIST_SITE must name a file to source, got $site"
    fi
    runtime="${KFAC_DIST_CONTAINER_RUNTIME:-apptainer}"
    launcher="${KFAC_DIST_LAUNCHER:-mpirun}"
    case "$launcher" in mpirun | srun) ;; *) die "KFAC_DIST_LAUNCHER must be mpirun or srun, got $launcher" ;; esac
    case "$runtime" in apptainer | pyxis) ;; *) die "KFAC_DIST_CONTAINER_RUNTIME must be apptainer or pyxis, got $runtime" ;; esac
    if [ -n "${KFAC_DIST_CONTAINER:-}" ] && [ "$runtime-$launcher" = pyxis-mpirun ]; then
        die "Pyxis starts containers through srun: set KFAC_DIST_LAUNCHER=srun as well"
    fi
    python="${KFAC_DIST_PYTHON:-}"
    if [ -z "$python" ]; then # in a container, the container's own
        python=python3
        [ -n "${KFAC_DIST_CONTAINER:-}" ] || [ ! -x "$home/.venv/bin/python" ] || python="$home/.venv/bin/python"
    fi
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
    export KFAC_DIST_PROGRESS="${KFAC_DIST_PROGRESS:-lines}" PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
}

# Sets `ranks`, all that the allocation has room for, and `per_node` where Slurm was not told how many tasks there are.
count_ranks() {
    local nodes="${SLURM_JOB_NUM_NODES:-1}"
    per_node=
    ranks="${SLURM_NTASKS:-}"
    if [ -z "$ranks" ]; then
        per_node="${SLURM_GPUS_ON_NODE:-1}"
        ranks=$((nodes * per_node))
    fi
}

# Sets `launch`: the command that starts a program on $1 ranks, the first nodes filled first.
make_launch() {
    local wanted=$1 most flags=()
    read -ra flags <<<"${KFAC_DIST_LAUNCH_FLAGS:-}"
    most="${per_node:-$(((ranks + ${SLURM_JOB_NUM_NODES:-1} - 1) / ${SLURM_JOB_NUM_NODES:-1}))}"
    if [ "$launcher" = mpirun ]; then
        launch=("$home/scripts/mpirun.sh" -n "$wanted")
        [ -z "$per_node" ] || launch+=(--map-by "ppr:$per_node:node:OVERSUBSCRIBE")
    else
        # With --kill-on-bad-exit the first rank that ends with 75 has the others killed, and 143 or 137 comes out.
        launch=(srun --mpi=pmix --kill-on-bad-exit=0 --ntasks="$wanted")
        if [ -n "$per_node" ] || [ "$wanted" -lt "$ranks" ]; then
            launch+=(--nodes="$(((wanted + most - 1) / most))" --ntasks-per-node="$((wanted < most ? wanted : most))")
        fi
        [ -z "$per_node" ] || launch+=(--overcommit) # Slurm gave CPUs for one task a node
        [ -z "${SLURM_CPUS_PER_TASK:-}" ] || launch+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it
        [ -z "${SLURM_GPUS_ON_NODE:-}" ] || launch+=(--gpu-bind=none) # peers that a rank cannot see, NCCL cannot reach
    fi
    launch+=(${flags[@]+"${flags[@]}"})
    enter_container
    # Ranks that are still starting would die of the signal; they install their handler when training begins. What is
    # `$0` tells this script that they are there.
    started="${TMPDIR:-/tmp}/kfac_dist-started.${SLURM_JOB_ID:-$$}"
    # shellcheck disable=SC2016  # sh is to expand it
    launch+=(sh -c 'trap "" USR1; true 2>/dev/null >"$0"; exec "$@"' "$started" "$python")
}

# Appends to `launch` what starts the rest of the command inside the container, if there is one.
enter_container() {
    [ -n "${KFAC_DIST_CONTAINER:-}" ] || return 0
    local mounts="$home:$home,$PWD:$PWD${KFAC_DIST_CONTAINER_MOUNTS:+,$KFAC_DIST_CONTAINER_MOUNTS}"
    if [ "$runtime" = pyxis ]; then
        launch+=(--container-image="$KFAC_DIST_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
    else
        launch+=(apptainer exec --bind "$mounts" --pwd "$PWD")
        [ -z "${SLURM_GPUS_ON_NODE:-}" ] || launch+=(--nv)
        launch+=("$KFAC_DIST_CONTAINER")
    fi
}

# Runs a command and sets `code`. A signal of Slurm's goes to the command as SIGUSR1, again and again, for ranks ignore
# it until training begins. The command runs in the background: bash runs no trap before its foreground command ends.
run_until_signal() {
    local interrupted
    [ -z "$stopped_by" ] || { code=75 && return; }
    rm -f "$started"
    "$@" &
    child=$!
    [ -z "$stopped_by" ] || repeat_signal
    while true; do
        interrupted=
        code=0
        wait "$child" || code=$?
        [ -n "$interrupted" ] || break
    done
    child=
    [ -z "$repeater" ] || kill "$repeater" 2>/dev/null || true
    repeater=
    rm -f "$started"
}

stopped_by= # the signal that came; SIGTERM, from scancel or preemption, prevails
child=
repeater=
started=

take_signal() {
    interrupted=1
    [ "$stopped_by" = TERM ] || stopped_by=$1
    say "got SIG$1: asking all ranks for a checkpoint"
    [ -n "$repeater" ] || [ -z "$child" ] || repeat_signal
}

# mpirun fails when it is to pass on a signal before its daemons are there, so the first waits for the ranks, at most for
# half a minute: from inside a container their sign may not be seen.
repeat_signal() {
    (
        for ((second = 0; second < 30; second++)); do
            if [ -z "$started" ] || [ -e "$started" ]; then break; fi
            sleep 1
        done
        sleep 1
        while kill -USR1 "$child"; do sleep 5; done
    ) >/dev/null 2>&1 &
    repeater=$!
}

trap 'take_signal USR1' USR1
trap 'take_signal TERM' TERM

# Ends the job with `code`. Only after 75, stopped after a checkpoint, it is queued again, and not if it was cancelled.
end_job() {
    rm -f "$started" || true # what a launch on one rank left
    case "$code" in
        75) ;;
        2 | 3 | 93) say "exit code $code: not queued again, see above" && exit "$code" ;;
        *) say "exit code $code" && exit "$code" ;;
    esac
    if [ "$stopped_by" = TERM ]; then
        say "exit code 75 after SIGTERM (scancel or preemption): not queued again by this script"
        exit 75
    fi
    trap '' USR1 TERM # the requeue ends this script with SIGTERM
    say "exit code 75: queueing the job again"
    scontrol requeue "$SLURM_JOB_ID" || say "Slurm refuses the requeue: submit again with --resume auto"
    exit 75
}
