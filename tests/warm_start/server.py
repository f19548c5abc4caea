"""Holds a Python that has imported what every program imports, and forks it for each program that a client asks for.

The tests start some three hundred programs, most of them on several ranks, and each takes longer to import torch than
to work. Only what others wrote is imported here: a program imports kfac_dist and starts MPI by itself, as ever.

    server.py SOCKET    serves until its standard input is closed
"""

import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from typing import Any

MODULES = (
    "torch", "torch._dynamo", "torch.utils.data", "torch.utils.tensorboard", "torchvision", "torchvision.transforms.v2",
    "numpy", "scipy.io", "sklearn.datasets", "PIL.Image", "pydantic", "tqdm", "safetensors.torch", "mpi4py",
)  # fmt: skip


def take_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A program's arguments, folder and environment, and the file descriptors of its standard streams."""
    content, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not content.endswith(b"\n"):
        content += connection.recv(1 << 20)
    return json.loads(content), streams


def become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Turn this process, just forked, into the one that a new interpreter would be; the program's arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    program = request["arguments"]
    first = request["folder"] if program[0] == "-m" else os.path.dirname(os.path.realpath(program[0]))
    added = [path for path in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *added, *sys.path[1:]]
    # Each interpreter starts with random seeds of its own: what a program forgot to seed must not agree between ranks.
    sys.modules["torch"].default_generator.seed()
    sys.modules["numpy"].random.seed()
    return program


def serve(path: str) -> list[str]:
    """Fork for each request; returns in the child, with what to run. In the server itself it ends the process."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # by the pidfd: process id and client
    while True:
        for key, _ in selector.select():
            if key.fileobj is server:
                connection, _ = server.accept()
                request, streams = take_request(connection)
                child = os.fork()
                if child == 0:
                    for _, other in children.values():
                        other.close()
                    server.close()
                    connection.close()
                    selector.close()
                    return become(request, streams)
                for stream in streams:
                    os.close(stream)
                pidfd = os.pidfd_open(child)
                children[pidfd] = child, connection
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(connection, selectors.EVENT_READ, pidfd)
                with contextlib.suppress(BrokenPipeError):  # it dies by itself, see below
                    connection.sendall(f"{child}\n".encode())
            elif key.fd in children:
                child, connection = children.pop(key.fd)
                _, status = os.waitpid(child, 0)
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                selector.unregister(key.fd)
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                connection.close()
                os.close(key.fd)
            elif key.fd == sys.stdin.fileno():
                for pidfd in children:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os._exit(0)
            elif key.data in children:  # the client was killed, and with it goes the program that it stands for
                selector.unregister(key.fileobj)
                signal.pidfd_send_signal(key.data, signal.SIGKILL)


if __name__ == "__main__":
    for module in MODULES:
        with contextlib.suppress(ImportError):  # which the program may do without
            importlib.import_module(module)
    program = serve(sys.argv[1])
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")
