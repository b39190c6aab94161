"""Builds the emulated ACL runtime with gcc against the headers of the installed wheel.

One library holds everything and is called `libascendcl.so`; the other names that the wheel links against are empty
libraries. What the wheel links against and the emulator does not have becomes a function that ends the process and
says its name. What the wheel looks up while it runs and the emulator does not have is simply not there, as with an
older CANN.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.emulated_npu.wheel import HOME, SITE

SOURCES = Path(__file__).with_name("acl")
NAMES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb")  # beside ascendcl
LINKED = ("lib/libtorch_npu.so", "lib/libtensorpipe.so", "lib/libop_plugin_atb.so", "lib/libnpu_profiler.so")
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden")

LINKER = ("-Wl,-soname,libascendcl.so", "-lpthread", "-lm")

CANN = re.compile(
    r"acl[A-Za-z]|Hccl|Msprof|rt[A-Z]|(snprintf|vsnprintf|strcpy)_s$|_ZN?K?N?K?(2ge|3atb)|_ZNK?(2ge|3atb)"
)

MISSING = """#include <stdio.h>
#include <stdlib.h>
static void missing(const char *name) {
    fprintf(stderr, "emulated NPU: torch_npu called %s, which is not emulated\\n", name);
    abort();
}
"""


def runtime() -> Path:
    """The folder with the libraries, built if they are not there; safe when several processes do this at once."""
    folder = HOME / "runtime" / _identity()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
        try:
            _build(partial)
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _build(folder: Path) -> None:
    ours = folder / "libascendcl.so"
    include = [f"-I{_in_c(folder)}", f"-I{SITE / 'torch_npu' / 'include'}"]
    sources = [str(file) for file in sorted(SOURCES.glob("*.c"))]
    _run("gcc", *FLAGS, *include, *sources, "-o", str(ours), *LINKER)
    have = set(_symbols("--defined-only", ours))
    wanted = {name for file in _linked() for name in _symbols("--undefined-only", file) if CANN.match(name)}
    stubs = folder / "missing.c"
    lines = [
        f'__attribute__((visibility("default"))) void {name}(void) {{ missing("{name}"); }}'
        for name in sorted(wanted - have)
    ]
    stubs.write_text(MISSING + "\n".join(lines) + "\n")
    _run("gcc", *FLAGS, *include, *sources, str(stubs), "-o", str(ours), *LINKER)
    for name in NAMES:
        # Linked with the one that holds everything, because functions are looked up by library.
        output = str(folder / f"lib{name}.so")
        _run("gcc", "-shared", "-x", "c", "/dev/null", f"-L{folder}", "-Wl,--no-as-needed", "-lascendcl", "-o", output)

    for name in ("runtime", "compiler", "opp"):  # the parts of a CANN installation that torch_npu looks for
        (folder / name).mkdir()


def _in_c(folder: Path) -> Path:
    """A folder of headers before the wheel's: that of HCCL's types has C++ constants, which C has no arrays of."""
    name = Path("third_party/hccl/inc/hccl/hccl_types.h")
    text = (SITE / "torch_npu" / "include" / name).read_text()
    header = folder / "include" / name
    header.parent.mkdir(parents=True)
    header.write_text(re.sub(r"^const u?int\d+_t (\w+) = +(\w+);", r"#define \1 \2", text, flags=re.MULTILINE))
    return folder / "include"


def _linked() -> list[Path]:
    package = SITE / "torch_npu"
    return [package / name for name in LINKED] + sorted(package.glob("_C.*.so"))


def _symbols(kind: str, library: Path) -> list[str]:
    lines = _run("nm", "-D", kind, str(library)).splitlines()
    return [line.split()[-1].split("@")[0] for line in lines if line.split()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ... failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _identity() -> str:
    """All that the libraries depend on."""
    files = [*sorted(SOURCES.glob("*.[ch]")), Path(__file__)]
    texts = [file.read_text() for file in files] + [_run("gcc", "--version")]
    texts += [f"{file.name} {file.stat().st_size}" for file in _linked()]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
