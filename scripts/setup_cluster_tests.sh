#!/usr/bin/env bash
# Installs what the tests of clusters need, from Debian's or Ubuntu's packages: Slurm, munge and PMIx, ShellCheck, ssh and
# network tools for several hosts, buildah and debootstrap for the container.
#
# scripts/test.sh calls it. It installs as root where no systemd runs, that is in containers, and starts no service;
# elsewhere it says what to install. Without these packages the tests are skipped, so it never fails.
set -euo pipefail

packages=(
    slurmctld slurmd slurm-client munge libpmix-dev # Slurm's plugin loads libpmix.so, which is in -dev
    shellcheck openssh-server openssh-client iproute2 iptables procps buildah debootstrap
)
PATH="$PATH:/usr/sbin:/sbin"

say() { echo "setup: $*"; }

is_installed() {
    local program
    for program in slurmctld slurmd srun munged shellcheck sshd ssh ip iptables ps buildah debootstrap; do
        command -v "$program" >/dev/null || return 1
    done
    compgen -G '/usr/lib/*/pmix2/lib/libpmix.so' >/dev/null
}

install_packages() {
    local options=(-qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60)
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # packages start their services only above runlevel 1
    apt-get "${options[@]}" update && apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}"
}

is_installed && exit 0
if [ "$(id -u)" -ne 0 ] || [ -d /run/systemd/system ] || ! command -v apt-get >/dev/null; then
    say "for the tests of clusters, which are skipped else: apt-get install --no-install-recommends ${packages[*]}"
    exit 0
fi
say "installing for the tests of clusters: ${packages[*]}"
log=$(mktemp)
install_packages >"$log" 2>&1 || say "warning: apt-get failed, those tests are skipped: $(tail -n 1 "$log")"
rm -f "$log"
