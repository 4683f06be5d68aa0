"""Does in a guest what the host orders, a line at a time, over a socket between the two (vsock(7))."""

import os
import socket
import time

HOST = 2
PORT = 5000
MIB = 1 << 20
# A piece of memory that is filled at a time, and the seconds after each.
PIECE = 10 * MIB
REST = 0.4


def read(most):
    """Reads files until they are so many bytes; gives how many there were."""
    done = 0
    for directory, _, names in os.walk("/usr"):
        for name in names:
            path = os.path.join(directory, name)
            if done >= most or not os.path.isfile(path) or os.path.islink(path):
                continue
            with open(path, "rb") as file:
                while piece := file.read(MIB):
                    done += len(piece)
    return done


def fill(amount):
    """Memory that is in use, as it comes to be so."""
    for _ in range(amount // PIECE):
        yield bytearray(b"\1") * PIECE
        time.sleep(REST)


def oom_kills():
    with open("/proc/vmstat") as fields:
        return next(int(line.split()[1]) for line in fields if line.startswith("oom_kill "))


host = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
host.connect((HOST, PORT))
orders = host.makefile("rw")
filled = []
for order in orders:
    word, *sizes = order.split()
    result = 0
    if word == "read":
        result = read(int(sizes[0]))
    elif word == "fill":
        filled.extend(fill(int(sizes[0])))
    elif word == "release":
        filled.clear()
    elif word == "end":
        result = oom_kills()
    print(word, result, file=orders, flush=True)
    if word == "end":
        os.system("systemctl poweroff")
