"""`forked_python.py SOCKET ARGUMENTS`: have the server of `processes.python_executable` run `python ARGUMENTS`."""

import json
import os
import signal
import socket
import sys


def main() -> None:
    """Send the order, pass signals on, and end as the process ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        order = {"arguments": sys.argv[2:], "environment": dict(os.environ), "cwd": os.getcwd()}
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        connection.sendall(json.dumps(order).encode() + b"\n")
        with connection.makefile() as answers:
            pid = int(answers.readline())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: os.kill(pid, number))
            code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
