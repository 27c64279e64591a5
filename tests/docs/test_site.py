"""The site builds without a warning, and its reference has everything that is public."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # In strict mode a warning is an error: a link or an anchor that leads nowhere, a page that no
    # menu has, a docstring that names an argument which is not there.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "module", ["opacus_bpclip", "opacus_bpclip.testing", "opacus_bpclip.audit"]
)
def test_the_reference_has_every_public_name(site: Path, module: str) -> None:
    anchors = {
        anchor
        for page in (site / "reference").glob("*.html")
        for anchor in re.findall(r'id="(opacus_bpclip[\w.]*)"', page.read_text())
    }
    missing = set(importlib.import_module(module).__all__)
    missing -= {anchor.rpartition(".")[2] for anchor in anchors}
    assert not missing


def test_pages_ask_no_other_host_for_anything(site: Path) -> None:
    for page in site.glob("**/*.html"):
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*?(?:src|href)="([^"]+)"', page.read_text())
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    for page in site.glob("**/*.html"):
        assert "arithmatex" not in page.read_text(), page
