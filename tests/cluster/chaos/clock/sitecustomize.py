"""Runs first in each Python process that has this folder on its path: the wall clock is off by as many seconds as the
file `CHAOS_CLOCK` says, from the moment on at which that is written there. The monotonic clock is not: no step of a
machine's time moves it.

grpc gets the true time: it adds a timeout to it, and its core, which is no Python, takes away the time that it reads
itself. A step of the machine's own clock is in both."""

import mmap
import os
import struct
import sys
import time


def steps(real, unit):
    def stepped():
        if sys._getframe(1).f_globals.get("__name__", "").startswith("grpc."):
            return real()
        return real() + type(unit)(struct.unpack("d", page)[0] * unit)

    return stepped


if (place := os.environ.get("CHAOS_CLOCK")) is not None:
    with open(place, "rb") as file:
        page = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    time.time, time.time_ns = steps(time.time, 1.0), steps(time.time_ns, 10**9)
