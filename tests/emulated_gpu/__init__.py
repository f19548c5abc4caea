"""A GPU for tests, on machines that have none: torch's own CUDA code, its operations carried out by the CPU.

    python -m tests.emulated_gpu [--gpus N] COMMAND [ARGUMENTS]

runs a command where torch finds N GPUs (1), all of whose memory is the host's. Torch's CUDA allocator, autograd engine,
autocast, streams and events are real, and so is its NCCL backend, over an NCCL that joins the processes of this host.
Operations on tensors of both the CPU and a GPU are refused as a GPU refuses them, those that would hold up the host are
reported (`torch.cuda.set_sync_debug_mode`), and asynchronous copies are late: what is read before it was waited for is
not there yet. New memory holds nan.

It knows nothing of a GPU's speed and of its kernels' rounding, and all that is asynchronous but copies to and from the
host is done at once.

    runtime.cpp     the CUDA runtime and driver
    nccl.cpp        NCCL
    operations.py   what becomes of each operation, within the process
    site/           how it gets there
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "libcuda.so.1"  # the driver's name, which torch loads


def why_not() -> str:
    """What is missing here for an emulated GPU; empty where nothing is."""
    import torch

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if shutil.which("g++") is None:
        return "there is no g++"
    headers = _headers()
    if headers is None:
        return "the headers of CUDA and NCCL did not come with torch"
    if (version := _cuda_version(headers)) != torch.version.cuda.partition(".")[0]:
        return f"torch is built for CUDA {torch.version.cuda}, but the headers that came with it are of CUDA {version}"
    return ""


def environment(num_gpus: int = 1) -> dict[str, str]:
    """Variables for processes that are to have GPUs."""
    paths = [str(HERE / "site"), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        "LD_PRELOAD": " ".join(filter(None, [str(_library()), os.environ.get("LD_PRELOAD", "")])),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "KFAC_DIST_EMULATED_GPUS": str(num_gpus),
    }


def _headers() -> list[Path] | None:
    """Folders of headers, in the order to look into them.

    CUDA's own wheel is of torch's version but lacks some that hardly change; Triton's, of another version, has all.
    """
    cuda = _folders_with("cuda_runtime_api.h", "nvidia", "cu*/include")
    triton = _folders_with("crt/host_defines.h", "triton", "backends/nvidia/include")
    nccl = _folders_with("nccl.h", "nvidia", "nccl/include")
    return [*cuda[:1], triton[0], nccl[0]] if triton and nccl else None


def _folders_with(header: str, package: str, folder: str) -> list[Path]:
    """Folders of an installed package, given as a pattern, that hold the header."""
    spec = importlib.util.find_spec(package)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return [found for place in places for found in sorted(place.glob(folder)) if (found / header).is_file()]


def _cuda_version(headers: list[Path]) -> str:
    """The major version that CUDA's headers are of."""
    text = (headers[0] / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    version = re.search(r"#define CUDART_VERSION\s+(\d+)", text)
    return str(int(version[1]) // 1000) if version else "?"


def _library() -> Path:
    """The compiled library, from the user's cache where it is there already."""
    headers = _headers()
    assert headers is not None, why_not()
    sources = [HERE / "runtime.cpp", HERE / "nccl.cpp"]
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-O2", *(f"-I{folder}" for folder in headers)]
    key = hashlib.sha256(b"".join([*(source.read_bytes() for source in sources), repr(command).encode()])).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache / "kfac_dist" / "emulated-gpu" / key[:16] / LIBRARY
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / LIBRARY
            subprocess.run([*command, f"-Wl,-soname,{LIBRARY}", "-o", made, *sources, "-lrt"], check=True)
            made.rename(library)
    return library
