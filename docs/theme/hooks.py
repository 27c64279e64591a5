"""What the site needs beyond its plugins: formulas without scripts, and the changelog as a page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from math_core import LatexToMathML
from mkdocs.structure.files import File, Files

# What arithmatex leaves of a formula: its TeX, between delimiters that say whether it is displayed.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
TO_MATHML = LatexToMathML()
# An option of the command line, as `--model`. Browsers would break it behind its hyphens.
OPTION = re.compile(r"<code>(?=--[a-z-]+</code>)")


def _mathml(formula: re.Match[str]) -> str:
    displayed = formula["tag"] == "div"
    tex = html.unescape(formula["tex"])
    made = TO_MATHML.convert_with_local_state(tex, displaystyle=displayed)
    return f'<div class="formula">{made}</div>' if displayed else made


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw by themselves, and mark options for styles.

    Raises:
        LatexError: TeX that has no MathML; the build fails.
    """
    return OPTION.sub('<code class="option">', FORMULA.sub(_mathml, content))


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the changelog, which lives at the repository's root, with links as of a page here."""
    text = (Path(config.docs_dir).parent / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changelog.md", content=text.replace("](docs/", "](")))
    return files
