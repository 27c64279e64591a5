"""An environment that has the built wheel, and of this repository nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What is in a checkout but in no clone, and what takes long to copy.
_LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info"),
    *("build", "dist", "data"),
)


@dataclass(frozen=True)
class Built:
    """The distributions.

    Attributes:
        wheel: made from the source distribution, as an installer makes it.
        source: the source distribution.
    """

    wheel: Path
    source: Path


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints; fail with its errors."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build both distributions from a copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "clone"
    shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
    # Without isolation: the build's requirements are installed, and no network is needed.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy, cwd=folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, source)


@pytest.fixture(scope="session")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new environment with the wheel, whose dependencies are ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", built.wheel),
        cwd=folder,
    )
    home = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # A path that comes behind the environment's own; what it has installed editable is not seen.
    (Path(home.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
