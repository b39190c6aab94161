"""Puts xLLM into a virtual environment of its own, and says what it does: `make serve` and `make test` call it.

It runs before anything is installed, so it needs nothing but the standard library. pip's own progress is shown; a
machine without an NVIDIA GPU is not given torch's CUDA build, which is gigabytes, unless that is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
EXTRAS = {"serving": "serve", "dev": "dev"}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, as its installation page names it
AS_OFFERED = "default"  # for --torch-index: whatever pip finds, CUDA or not
CUDA_PACKAGE = re.compile(r"(nvidia|cuda)[-_.]", re.IGNORECASE)
COLLECTING = re.compile(r"\s*Collecting ([A-Za-z0-9._-]+)")
DOWNLOADING_TORCH = re.compile(r"\s*Downloading (?:\S*/)?(torch-\S+\.whl) \((\d+)(?:\.\d+)? MB\)")
CPU_BUILD_MB = 400  # none is larger (190 MB on Linux, x86-64); CUDA builds are (530 MB without what they require)
Environment = Mapping[str, str]


class Installer:
    """venv: the environment's folder, made if it is not there. env: of pip, None: that of this process."""

    def __init__(self, venv: Path, env: Environment | None = None):
        self.venv = venv
        self.env = {**(os.environ if env is None else env), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.python = str(venv / "bin" / "python")

    def make_venv(self) -> None:
        if not Path(self.python).exists():
            subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True)

    def cuda_packages(self) -> list[str] | None:
        """CUDA packages that an installation of torch would bring; None if pip cannot tell, as it cannot offline.

        pip's report of a dry run is made after it has fetched all of them. What it prints meanwhile names them before:
        the first CUDA package that it collects ends it. Where there is none, the report decides. fast-deps: where the
        index does not state apart from a package what it requires, read that part of it alone.
        """
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            asking = [self.python, "-m", "pip", "install", "--dry-run", "--use-feature=fast-deps", "--retries=1",
                      "--timeout=15", "--report", str(report), "-c", str(CONSTRAINTS), "torch"]
            asked = subprocess.Popen(asking, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                     env={**self.env, "PYTHONUNBUFFERED": "1"})
            assert asked.stdout is not None
            with asked:
                for line in asked.stdout:
                    if sign := cuda_sign(line):
                        asked.kill()
                        return [sign]
            if asked.returncode != 0 or not report.exists():
                return None
            names = [entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]]
            return [name for name in names if CUDA_PACKAGE.match(name)]

    def pip(self, *arguments: str) -> None:
        """Runs pip, which shows what it does. Raises CalledProcessError."""
        subprocess.run([self.python, "-m", "pip", *arguments], check=True, cwd=ROOT, env=self.env)

    def forget_old_name(self) -> None:
        """Before it was called xllm-engine, this checkout was installed as `xllm`."""
        for folder in self.venv.glob("lib/python*/site-packages/xllm-*.dist-info"):
            origin = folder / "direct_url.json"
            if origin.exists() and json.loads(origin.read_text()).get("url") == ROOT.as_uri():
                self.pip("uninstall", "--yes", "--quiet", "xllm")

    def size_bytes(self) -> int:
        """What the environment takes on the disk, as `du` counts it."""
        stats = {(stat.st_dev, stat.st_ino): stat.st_blocks * 512
                 for path in self.venv.rglob("*") for stat in [path.lstat()]}
        return sum(stats.values())


def cuda_sign(line: str) -> str | None:
    """What in a line of pip's output says that it would install CUDA, if anything does."""
    if (found := COLLECTING.match(line)) and CUDA_PACKAGE.match(found[1]):
        return found[1]
    if (found := DOWNLOADING_TORCH.match(line)) and int(found[2]) > CPU_BUILD_MB:
        return found[1]
    return None


def has_nvidia_gpu() -> bool:
    """By the driver. An Ascend NPU needs torch's CPU build as well, beside torch_npu."""
    return shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia*"))


def choose_torch(installer: Installer, index: str, goal: str, *, has_gpu: bool) -> bool:
    """Install torch from `index` if one is given; else whether pip may take the one that it finds, with the reason
    printed."""
    if index and index != AS_OFFERED:
        say(f"taking it from {index}")
        installer.pip("install", "--no-deps", "--index-url", index, "-c", str(CONSTRAINTS), "torch")
        return True
    if index == AS_OFFERED or has_gpu:
        say("as pip's index offers it")
        return True
    say("no NVIDIA GPU here: asking pip which build it would take")
    packages = installer.cuda_packages()
    if packages is None:
        say("pip cannot tell (is its index out of reach?); going on")
    elif packages:
        print(f"""
This machine has no NVIDIA GPU, and what pip would take is torch's CUDA build ({packages[0]} and others): gigabytes
that nothing here can use. Nothing of it was installed. For the CPU build, about 200 MB, from PyTorch's index:

    make {goal} TORCH_INDEX={CPU_INDEX}

TORCH_INDEX={AS_OFFERED} takes the CUDA build all the same.""", file=sys.stderr)
        return False
    else:
        say("a CPU build")
    return True


def phase(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def say(text: str) -> None:
    print(f"      {text}", flush=True)


def main(argv: Sequence[str] | None = None, *, has_gpu: bool | None = None, env: Environment | None = None) -> int:
    """Returns the exit code. has_gpu, env: for tests; None: as this machine and process have it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(EXTRAS), help="what serving needs, or the developers' tools as well")
    parser.add_argument("--venv", type=Path, required=True, help="folder of the virtual environment")
    parser.add_argument("--torch-index", default="", metavar="URL",
                        help=f"take torch from here; {AS_OFFERED!r}: whatever pip finds, CUDA or not")
    parser.add_argument("--goal", default="serve", help="the target that was made, for messages")
    args = parser.parse_args(argv)
    installer = Installer(args.venv.absolute(), env)
    began_s = time.monotonic()
    try:
        phase(1, f"virtual environment in {args.venv}")
        installer.make_venv()
        phase(2, "torch: which build")
        if not choose_torch(installer, args.torch_index.strip(), args.goal,
                            has_gpu=has_nvidia_gpu() if has_gpu is None else has_gpu):
            return 1
        phase(3, f"packages: what {'serving' if args.what == 'serving' else 'serving and developing'} needs")
        installer.forget_old_name()
        # Of torch and transformers a server imports a part, which Python compiles at first use.
        plain = ["--no-compile"] if args.what == "serving" else []
        installer.pip("install", *plain, "-c", str(CONSTRAINTS), "-e", f".[{EXTRAS[args.what]}]")
        phase(4, "CPU kernels: compiling C for this processor, some seconds; kept for later starts")
        subprocess.run([str(installer.venv / "bin" / "xllm"), "doctor", "--compile"], check=True, env=installer.env)
    except subprocess.CalledProcessError as error:
        print(f"\nfailed ({error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    print(f"\ninstalled in {time.monotonic() - began_s:.0f} s: {installer.size_bytes() / 1e9:.2f} GB in {args.venv}\n",
          flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
