"""Stands for a program that the server of this folder runs: passes signals on to it, and ends as it does.

python -I -S client.py PROGRAM [ARGUMENT ...]      the variable KFAC_DIST_TEST_SERVER names the server's socket
"""

import contextlib
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)

waiting: list[int] = []
child = 0


def forward(number: int, _: object) -> None:
    if child:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and its exit code is on the way
            os.kill(child, number)
    else:
        waiting.append(number)


for each in FORWARDED:
    signal.signal(each, forward)
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["KFAC_DIST_TEST_SERVER"])
request = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
content = json.dumps(request).encode() + b"\n"
sent = socket.send_fds(connection, [content], [0, 1, 2])
connection.sendall(content[sent:])
answers = connection.makefile()
child = int(answers.readline())
for each in waiting:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, each)
code = int(answers.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
