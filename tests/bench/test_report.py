"""Tables say what was measured, what was not and why; verdicts are computed, not typed."""

from opacus_bpclip.bench.record import Record
from opacus_bpclip.bench.report import summary, tables
from opacus_bpclip.bench.settings import CASES
from opacus_bpclip.bench.targets import TARGETS, verdicts
from tests.bench.tiny import CNN, CURVE, arm, comparison, record


def test_a_case():
    text = tables(record(CNN))
    assert "1 CPU thread(s); torch 2.13." in text
    assert "### CNN26k, batch 256\n\n1,234 parameters; rounds: 3.\n" in text
    assert (
        "| `weighted` | 1.10 (1.10 to 1.15) | 2200 ms | 1.05 (1.05 to 1.05) | 105.0 MiB |" in text
    )
    assert "- `ew` does not run: RuntimeError: no rule for Tanh" in text
    assert "| `ew` |" not in text


def test_targets():
    text = tables(record(CNN))
    # 1.1 is 1.10000000000000009 here: the verdict is on the number, the table shows two digits.
    assert "| cnn26k | `exact` | time | <= 1.60 | 2.00 | **no** |" in text
    assert "| cnn26k | `weighted` | memory | <= 1.10 | 1.05 | yes |" in text
    assert "| cnn26k | `product` | time | <= 1.10 | - | - |" in text
    lead = "time of `ghost`, Opacus's fastest mode, over its own"
    assert f"| cnn26k | `weighted` | {lead} | >= 1.80 | 2.27 | yes |" in text
    assert f"| cnn26k | `exact` | {lead} | >= 1.00 | 1.25 | yes |" in text
    smaller = "memory of `hooks`, Opacus's smallest mode, over its own"
    assert f"| cnn26k | `weighted` | {smaller} | >= 1.00 | 2.86 | yes |" in text


def test_growth_curve_has_no_targets():
    text = tables(record(*CURVE))
    assert "### Targets" not in text
    told = "Time ratio / memory ratio, medians; batch size 256, depth 2."
    assert f"### Growth with width: MLP\n\n{told}\n\n" in text
    assert "| width | `weighted` |\n|---|---|\n| 128 | 1.25 / - |\n| 256 | 1.12 / - |" in text
    assert [*verdicts(CURVE[0])] == []


def test_growth_curve_of_a_model_without_other_sizes_says_no_more():
    curve = comparison(
        "cnn26k", arm("non-private", [1.0]), arm("weighted", [2.0]), axis="batch", value=16
    )
    assert "### Growth with batch: CNN26k\n\nTime ratio / memory ratio, medians.\n\n" in tables(
        record(curve)
    )


def test_summary_leaves_growth_and_base_out():
    text = summary(record(CNN, *CURVE))
    assert text.endswith(
        "| case | `weighted` | `exact` | `hooks` | `ghost` |\n|---|---|---|---|---|\n"
        "| CNN26k, batch 256 | 1.10 / 1.05 | 2.00 / 1.50 | 3.00 / 3.00 | 2.50 / 3.50 |"
    )


def test_compiled_arms_have_a_base_of_their_own():
    own = comparison(
        "transformer",
        arm("non-private", [4.0, 4.0]),
        arm("non-private-compiled", [2.0, 2.0], None),
        arm("weighted-compiled", [3.0, 3.0], None),
    )
    text = tables(record(own))
    assert "| `weighted-compiled` | 1.50 (1.50 to 1.50) | 3000 ms | - | - |" in text
    assert "| transformer | `weighted-compiled` | time | <= 1.10 | 1.50 | **no** |" in text


def test_nothing_measured():
    assert tables(Record()) == summary(Record()) == "No results yet."


def test_targets_name_cases():
    assert set(TARGETS) <= set(CASES)
