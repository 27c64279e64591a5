"""Tables say what was measured, what was not and why; verdicts are computed, not typed."""

from opacus_bpclip.bench.report import summary, tables
from opacus_bpclip.bench.targets import verdicts
from tests.bench.tiny import CNN, CURVE, arm, comparison, record


def test_a_case_and_its_targets():
    text = tables(record(CNN))
    faster = "time against `ghost`, Opacus's fastest mode"
    smaller = "memory against `hooks`, Opacus's smallest mode"
    weighted = "1.10 (1.10 to 1.15) | 2200 ms | 1.05 (1.05 to 1.05) | 105.0 MiB"
    for line in (
        "### CNN26k, batch 256\n\n1,234 parameters; rounds: 3.\n",
        "1 CPU thread(s); python 3.11, torch 2.13, opacus 1.6, opacus_bpclip 0.1.",
        f"| `layerwise-weighted` | {weighted} |",
        "- `ew` does not run: RuntimeError: no rule for Tanh",
        "| cnn26k | `joint-exact` | time | <= 1.50 | 2.00 | **no** |",
        "| cnn26k | `joint-exact` | memory | <= 1.50 | 1.50 | yes |",
        f"| cnn26k | `joint-exact` | {faster} | < 1.00 | 0.80 | yes |",
        f"| cnn26k | `joint-exact` | {smaller} | < 1.00 | 0.50 | yes |",
    ):
        assert line in text
    assert "| `ew` |" not in text
    assert text.count("| cnn26k |") == 4


def test_targets_against_opacus_are_of_every_case_and_a_tie_misses_them():
    own = comparison(
        "lstm", arm("non-private", [1.0]), arm("joint-exact", [2.0]), arm("ew", [2.0], (2**21,))
    )
    assert [(each.measured, each.met) for each in verdicts(own)] == [(1.0, False), (0.5, True)]


def test_what_was_not_measured_has_no_verdict():
    own = comparison("transformer", arm("non-private", [1.0]), arm("ew", [2.0]))
    assert {(each.measured, each.met) for each in verdicts(own)} == {(None, None)}
    text = tables(record(own))
    assert "| transformer | `joint-exact-compiled` | time | <= 1.20 | - | - |" in text


def test_growth_curve_has_no_targets():
    text = tables(record(*CURVE))
    assert "### Targets" not in text
    told = "Time ratio / memory ratio, medians; batch size 256, depth 2."
    assert f"### Growth with width: MLP\n\n{told}\n\n" in text
    assert "| width | `joint-exact` |\n|---|---|\n| 128 | 1.25 / - |\n| 256 | 1.12 / - |" in text
    assert [*verdicts(CURVE[0])] == []
    alone = comparison("cnn26k", *CURVE[0].arms, axis="batch", value=16)
    text = tables(record(alone))
    assert "### Growth with batch: CNN26k\n\nTime ratio / memory ratio, medians.\n\n" in text


def test_summary_is_of_the_default_arm_in_cases():
    other = comparison("lstm", arm("non-private", [1.0]), arm("layerwise-exact", [2.0]))
    alone = comparison("mlp", arm("non-private", [1.0]), arm("joint-exact", [1.5]))
    text = summary(record(CNN, *CURVE, other, alone))
    assert text.endswith(
        "| case | without privacy | Opacus's fastest mode | Opacus's smallest mode |\n"
        "|---|---|---|---|\n"
        "| CNN26k, batch 256 | 2.00 / 1.50 | 0.80 / 0.43 (`ghost`) | 0.67 / 0.50 (`hooks`) |\n"
        "| MLP, batch 256, width 2,048, depth 2 | 1.50 / 1.00 | - | - |"
    )
    assert summary(record(*CURVE, other)) == "No results yet."


def test_compiled_arms_have_a_base_of_their_own():
    own = comparison(
        "transformer",
        arm("non-private", [4.0, 4.0]),
        arm("non-private-compiled", [2.0, 2.0], None),
        arm("joint-exact-compiled", [3.0, 3.0], None),
    )
    text = tables(record(own))
    assert "| `joint-exact-compiled` | 1.50 (1.50 to 1.50) | 3000 ms | - | - |" in text
    assert "| transformer | `joint-exact-compiled` | time | <= 1.20 | 1.50 | **no** |" in text


def test_nothing_measured():
    assert tables(record()) == summary(record()) == "No results yet."
