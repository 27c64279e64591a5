"""The figures that README.md quotes are the published ones."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

README = (ROOT / "README.md").read_text()


def published() -> dict[str, list[tuple[float, float]]]:
    """Return time and memory of each case, by what they are compared with.

    From the short table of docs/benchmarks.md, which another test holds to docs/benchmarks.json.
    """
    text = (ROOT / "docs/benchmarks.md").read_text()
    table = text.partition("<!-- bench-summary -->")[2].partition("<!-- /bench-summary -->")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    titles, _, *cases = rows
    return {
        title.strip(): [
            (float(found[1]), float(found[2]))
            for case in cases
            if (found := re.match(r" ([\d.]+) / ([\d.]+)", case[column]))
        ]
        for column, title in enumerate(titles)
        if column
    }


def test_time_is_quoted_as_published() -> None:
    *most, worst = sorted(time for time, _ in published()["Opacus's fastest mode"])
    assert len(most) == 7
    assert (
        f"**{most[0]:.2f} to {most[-1]:.2f}** of Opacus's fastest mode in seven of eight models "
        f"({worst:.2f} in the eighth)" in README
    )


def test_time_against_training_without_privacy_is_quoted_as_published() -> None:
    *most, _, worst = sorted(time for time, _ in published()["without privacy"])
    assert len(most) == 6
    assert (
        f"{most[0]:.2f} to {most[-1]:.2f} times training without privacy in six of eight "
        f"({worst:.2f} at most)" in README
    )


def test_memory_is_quoted_as_published() -> None:
    *most, _, worst = sorted(memory for _, memory in published()["without privacy"])
    assert len(most) == 6
    assert (
        f"**{most[0]:.2f} to {most[-1]:.2f}** times training without privacy in six of eight "
        f"models ({worst:.2f} at most)" in README
    )


def accuracy(arm: str, table: str) -> float:
    """Return an arm's mean accuracy, in percent."""
    (found,) = re.findall(rf"^\| {re.escape(arm)} \| ([\d.]+)% ", table, re.MULTILINE)
    return float(found)


def test_accuracy_is_quoted_as_published() -> None:
    text = (ROOT / "docs/study-results.md").read_text()
    mnist = text.partition("## MNIST at epsilon 1")[2].partition("\n## ")[0]
    assert (
        f"**{accuracy('joint-whitened', mnist):.1f} %** on MNIST at epsilon 1 with "
        "[whitened](docs/options.md#should-inputs-be-whitened) and clipped inputs, where "
        f"Opacus's flat clipping has {accuracy('flat', mnist):.1f} %" in README
    )
