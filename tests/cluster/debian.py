"""Debian packages that tests need and pip cannot bring: installed where that is possible, else a reason to skip."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_APT = ("apt-get", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1")
_SECONDS = 300
_SERVICES_POLICY = Path("/usr/sbin/policy-rc.d")


@cache
def ensure_packages(*names: str) -> str | None:
    """See that Debian packages are installed; as root with apt-get the missing ones are installed, for good.

    No service that comes with a package is started.

    Args:
        names: Packages, such as ``"openssh-server", "iproute2"``.

    Returns:
        None if all are there now, else the reason, in words fit for `pytest.skip`.
    """
    if shutil.which("dpkg-query") is None:
        return f"needs the Debian packages {' '.join(names)}, and this is not Debian or Ubuntu"
    missing = [name for name in names if not _is_installed(name)]
    if not missing:
        return None
    wish = f"needs the Debian packages {' '.join(missing)}: apt-get install {' '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return wish
    with _services_stay_off():
        error = _apt("install", "--yes", "--no-install-recommends", *missing)
        if error is not None:  # the lists of packages may be missing or old
            _apt("update", "--quiet")
            error = _apt("install", "--yes", "--no-install-recommends", *missing)
    return None if error is None else f"{wish}; that failed here: {error}"


def _is_installed(name: str) -> bool:
    asked = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${db:Status-Status}", name], capture_output=True, text=True
    )
    return asked.returncode == 0 and asked.stdout == "installed"


def _apt(*arguments: str) -> str | None:
    """Run apt-get; returns the last line of what went wrong, None if nothing did."""
    try:
        done = subprocess.run(
            [*_APT, *arguments],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"apt-get {arguments[0]} took more than {_SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]


@contextmanager
def _services_stay_off() -> Iterator[None]:
    """Debian asks this file whether a package's service may be started; 101 forbids it."""
    if _SERVICES_POLICY.exists():
        yield
        return
    _SERVICES_POLICY.write_text("#!/bin/sh\nexit 101\n")
    _SERVICES_POLICY.chmod(0o755)
    try:
        yield
    finally:
        _SERVICES_POLICY.unlink(missing_ok=True)
