#!/usr/bin/env bash
# Makes a container a host that mpirun reaches over ssh, as the container's own user; no root.
#
#   docker/ssh-host.sh serve             sshd in the foreground on $SSH_PORT (2222)
#   docker/ssh-host.sh run HOST... -- COMMAND ...     waits until all HOSTs answer, then runs COMMAND
#
# The containers share the folder ~/.ssh as a volume. The first to come makes a key there, which lets its holder in and
# also identifies the hosts, so nothing is trusted unseen. Whoever can read the volume can log in.
set -euo pipefail
port="${SSH_PORT:-2222}"
folder="$HOME/.ssh"

make_keys() ( # a subshell: the lock ends with it, and not with the command that this script becomes
    exec 9>"$folder/lock"
    flock 9 # containers start at once
    [ ! -e "$folder/config" ] || exit 0
    umask 077
    ssh-keygen -q -t ed25519 -N "" -C kfac_dist -f "$folder/id"
    ssh-keygen -q -t ed25519 -N "" -C kfac_dist -f "$folder/host"
    cp "$folder/id.pub" "$folder/authorized_keys"
    echo "* $(cut -d " " -f 1,2 "$folder/host.pub")" >"$folder/known_hosts"
    printf '%s\n' "Port $port" "IdentityFile $folder/id" "BatchMode yes" "ConnectTimeout 5" \
        "StrictHostKeyChecking yes" >"$folder/config"
)

serve() {
    printf '%s\n' "Port $port" "HostKey $folder/host" "AuthorizedKeysFile $folder/authorized_keys" \
        "PasswordAuthentication no" "KbdInteractiveAuthentication no" "UsePAM no" "PidFile none" \
        "MaxStartups 64" >"/tmp/sshd_config.$port"
    exec /usr/sbin/sshd -D -e -f "/tmp/sshd_config.$port" # sshd wants its full path
}

wait_for() {
    local host
    for host in "$@"; do
        for _ in {1..60}; do
            ssh "$host" true 2>/dev/null && continue 2
            sleep 1
        done
        echo "ssh-host.sh: error: $host does not answer on port $port" >&2
        exit 1
    done
}

make_keys
case "${1:-}" in
    serve) serve ;;
    run)
        shift
        hosts=()
        while [ "${1:-}" != "--" ]; do
            hosts+=("${1:?ssh-host.sh run: name the hosts, then --}")
            shift
        done
        shift
        wait_for "${hosts[@]}"
        exec "$@"
        ;;
    *) sed -n '2,5p' "$0" >&2 && exit 2 ;;
esac
