"""Runs first in each Python process that has this folder on its path: the wall clock is off by as many seconds as the
file `CHAOS_CLOCK` says, from the moment on at which that is written there. The monotonic clock is not: no step of a
machine's time moves it."""

import mmap
import os
import struct
import time

if (place := os.environ.get("CHAOS_CLOCK")) is not None:
    with open(place, "rb") as file:
        page = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    real_s, real_ns = time.time, time.time_ns
    time.time = lambda: real_s() + struct.unpack("d", page)[0]
    time.time_ns = lambda: real_ns() + int(struct.unpack("d", page)[0] * 10**9)
