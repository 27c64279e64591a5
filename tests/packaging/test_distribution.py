"""The wheel and the source distribution have what they need, and the wheel works elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Built, run

# `.ci/run` calls it.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("stranger.py")


def test_the_wheel_has_the_package_and_nothing_else(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "opacus_bpclip").rglob("*")
        if path.suffix in {".py", ".typed"}
    }
    assert package == files
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_source_distribution_has_what_its_tests_need(built: Built) -> None:
    with tarfile.open(built.source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "mkdocs.yml", ".ci/run"}
    needed |= {
        "docs/guarantee.md",
        "docs/benchmarks.json",
        "tests/conftest.py",
        "benchmarks/gpu.sh",
    }
    assert needed <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_installed_package_trains_and_audits(python: Path, tmp_path: Path) -> None:
    script = shutil.copy(SCRIPT, tmp_path)
    printed = run(python, "-W", "ignore", script, cwd=tmp_path)
    assert re.fullmatch(r"epsilon \d+\.\d\d, audit: pass\n", printed)


def test_the_installed_command_runs(python: Path, tmp_path: Path) -> None:
    printed = run(python.with_name("opacus-bpclip"), "--version", cwd=tmp_path)
    assert re.search(r"\b\d+\.\d+\.\d+\b", printed)
    where = run(python, "-c", "import opacus_bpclip as p; print(p.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])


def strictly_checked(python: Path, script: Path) -> str:
    """Return what a strict type checker says of a script, with the environment's packages."""
    cache = python.parents[1] / "types"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache),
            *("--python-executable", python, script),
        ],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_strangers_script_passes_strict_type_checks(python: Path, tmp_path: Path) -> None:
    script = Path(shutil.copy(SCRIPT, tmp_path))
    assert strictly_checked(python, script).startswith("Success")


MISTAKES = {
    'bound="weighted"': ('bound="tight"', "arg-type"),
    "max_grad_norm=1.0": ('max_grad_norm="1"', "arg-type"),
    "verdict.outcome": ("verdict.result", "attr-defined"),
}


def test_a_strangers_mistakes_are_seen(python: Path, tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    for right, (wrong, _) in MISTAKES.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    script = tmp_path / "mistaken.py"
    script.write_text(text)
    said = strictly_checked(python, script)
    for wrong, kind in MISTAKES.values():
        line = next(n for n, each in enumerate(text.splitlines(), 1) if wrong in each)
        assert re.search(rf"mistaken\.py:{line}: error: .*\[{kind}\]", said), said
    assert f"Found {len(MISTAKES)} errors" in said
