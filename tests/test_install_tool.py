"""`tools/install.py`, which runs before anything is installed: which torch pip would take, asked of a real pip."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house import ROOT
from tools import install

Captured = pytest.CaptureFixture[str]
MESSAGE = f"make chat TORCH_INDEX={install.CPU_INDEX}"


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / "venv"
    install.Installer(folder).make_venv()
    return folder


def offering(folder: Path, version: str, *requires: str) -> dict[str, str]:
    """The environment of a pip that finds this torch and nothing else."""
    for name, number, needed in (("torch", version, requires), ("nvidia_cublas", "13.1", ())):
        metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}", *(f"Requires-Dist: {n}" for n in needed)]
        with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{number}.dist-info"
            wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


def installed(venv: Path) -> str:
    listed = subprocess.run([venv / "bin" / "python", "-m", "pip", "list"], capture_output=True, text=True, check=True)
    return listed.stdout


def pinned_torch() -> str:
    lines = install.CONSTRAINTS.read_text().splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


def test_a_cuda_build_is_refused_where_there_is_no_gpu(venv: Path, tmp_path: Path, capfd: Captured) -> None:
    env = offering(tmp_path, pinned_torch(), "nvidia-cublas>=13")
    assert install.main(["serving", "--venv", str(venv), "--goal", "chat"], has_gpu=False, env=env) == 1
    assert MESSAGE in capfd.readouterr().err
    assert "torch" not in installed(venv)


def test_a_cpu_build_is_taken_without_a_word(venv: Path, tmp_path: Path, capfd: Captured) -> None:
    installer = install.Installer(venv, offering(tmp_path, f"{pinned_torch()}+cpu"))
    assert installer.cuda_packages() == []
    assert install.choose_torch(installer, "", "chat", has_gpu=False)
    assert capfd.readouterr().err == ""


def test_with_a_gpu_or_by_choice_it_is_not_asked(venv: Path, tmp_path: Path) -> None:
    installer = install.Installer(venv, offering(tmp_path, pinned_torch(), "nvidia-cublas>=13"))
    assert install.choose_torch(installer, "", "chat", has_gpu=True)
    assert install.choose_torch(installer, install.AS_OFFERED, "chat", has_gpu=False)


def test_where_pip_cannot_tell_that_is_said(venv: Path, tmp_path: Path, capsys: Captured) -> None:
    installer = install.Installer(venv, {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1",
                                         "PIP_FIND_LINKS": str(tmp_path)})
    assert installer.cuda_packages() is None
    assert install.choose_torch(installer, "", "chat", has_gpu=False)
    assert "pip cannot tell" in capsys.readouterr().out


def test_an_index_that_is_named_is_where_torch_alone_comes_from(venv: Path, tmp_path: Path) -> None:
    """A folder with a page a package is an index. It has no second package, and none is asked for."""
    env = {name: value for name, value in offering(tmp_path, f"{pinned_torch()}+cpu", "sympy").items()
           if name not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    wheel = next(tmp_path.glob("torch-*.whl"))
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "index.html").write_text(f'<a href="../{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    installer = install.Installer(venv, env)
    try:
        assert install.choose_torch(installer, tmp_path.as_uri(), "chat", has_gpu=False)
        assert f"{pinned_torch()}+cpu" in installed(venv) and "sympy" not in installed(venv)
    finally:
        installer.pip("uninstall", "--yes", "--quiet", "torch")


def test_the_public_index_offers_cuda_and_is_left_at_once(venv: Path) -> None:
    """Without what this machine's pip is told by its configuration; skipped where no index can be reached."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the public index has no CUDA build for this machine")
    env = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    packages = install.Installer(venv, env).cuda_packages()
    if packages is None:
        pytest.skip("no package index can be reached")
    assert packages and install.CUDA_PACKAGE.match(packages[0])


@pytest.mark.parametrize(("line", "sign"), [
    ("Collecting nvidia-cublas==13.1.1.3 (from torch)", "nvidia-cublas"),
    ("Collecting cuda-toolkit[cublas]==13.0", "cuda-toolkit"),
    ("  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)", "torch-2.13.0-cp311-cp311-"
                                                                                    "manylinux_2_28_x86_64.whl"),
    ("  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)", None),
    ("  Downloading https://host/whl/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (191.8 MB)", None),
    ("Collecting torch", None),
    ("Collecting filelock (from torch)", None),
])
def test_signs_of_cuda_in_what_pip_prints(line: str, sign: str | None) -> None:
    assert install.cuda_sign(line) == sign


def test_it_needs_nothing_that_is_installed() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "tools" / "install.py"), "--help"],
                          capture_output=True, text=True, check=True)
    assert "serving" in done.stdout
