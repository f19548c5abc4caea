"""Debian packages that tests need and pip cannot bring; scripts/setup_cluster_tests.sh installs them in containers."""

import shutil
import subprocess


def reason_packages_are_missing(*names: str) -> str | None:
    """A reason to skip: which of these Debian packages are not installed; None if all are.

    Args:
        names: Packages, such as ``"openssh-server", "iproute2"``.
    """
    if shutil.which("dpkg-query") is None:
        return f"needs the Debian packages {' '.join(names)}, and this is not Debian or Ubuntu"
    missing = [name for name in names if not _is_installed(name)]
    if not missing:
        return None
    return f"needs the Debian packages {' '.join(missing)}: apt-get install --no-install-recommends {' '.join(missing)}"


def _is_installed(name: str) -> bool:
    asked = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${db:Status-Status}", name], capture_output=True, text=True
    )
    return asked.returncode == 0 and asked.stdout == "installed"
