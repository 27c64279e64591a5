"""Settings of the arms, and the results as a file, a table and a picture, from made-up ones."""

import json
from dataclasses import replace

import pytest

from opacus_bpclip import BackpropClipping, InputWhitening, PinkNoise
from opacus_bpclip.ab.plot import draw
from opacus_bpclip.ab.report import heading, render
from opacus_bpclip.ab.settings import ARMS, NON_PRIVATE, Settings
from opacus_bpclip.jobs.tables import TERMINAL
from tests.ab.results import PLAN, finished

PUBLIC = replace(PLAN, noise_multiplier=None, epsilons=())


def test_defaults_are_the_datasets_own():
    digits, mnist = Settings(), Settings(dataset="mnist")
    assert (digits.epsilon, digits.batch_size, digits.threads) == (3.0, 128, 1)
    assert (mnist.epsilon, mnist.epochs, mnist.batch_size, mnist.lr) == (1.0, 10, 1024, 0.5)
    assert (mnist.max_grad_norm, mnist.max_input_norm, mnist.momentum) == (1.0, None, 0.9)
    assert (mnist.delta, mnist.bound, mnist.allocation) == (1e-5, "exact", "dimension")
    assert (mnist.seeds, mnist.arms, mnist.accountant) == ((0, 1, 2), ARMS, "prv")


def test_options_are_those_of_the_arms_that_have_them():
    plain = Settings()
    assert plain.backprop("backprop") == BackpropClipping()
    assert plain.backprop("backprop-layerwise") == BackpropClipping(allocation="dimension")
    assert [plain.backprop(arm) for arm in ARMS[:3]] == [None, None, None]
    assert plain.allocation == BackpropClipping.paper().allocation
    given = {"bound": "weighted", "max_input_norm": 4.0, "normalize": True}
    settings = Settings(allocation="equal", **given)
    assert settings.backprop("backprop") == BackpropClipping(**given)
    layerwise = BackpropClipping(allocation="equal", **given)
    assert settings.backprop("backprop-layerwise") == layerwise
    noise = PinkNoise(mean=0.3, deviation=0.35)  # the digits' own
    whitened = {**given, "bound": "exact", "whitening": InputWhitening(noise)}
    assert settings.backprop("backprop-whitened") == BackpropClipping(**whitened)
    own = Settings(dataset="mnist").backprop("backprop-whitened")
    assert own == BackpropClipping(whitening=InputWhitening())
    for either in (plain, settings):
        assert either.backprop("paper") == BackpropClipping.paper()


@pytest.mark.parametrize(
    ("given", "norms"),
    [(None, [None, None, 3, None, None, None, 3]), (4, [None, None, 4, 4, 4, 4, 3])],
)
def test_input_norm_of_each_arm(given, norms):
    settings = Settings(max_input_norm=given)
    assert [settings.input_norm(arm) for arm in ARMS] == norms


def test_table():
    rows = [f"{arm:<19}    88.75%  87.50..90.00    2.998  1e-05             2.017" for arm in ARMS]
    rows[0] = f"{NON_PRIVATE:<19}    88.75%  87.50..90.00        -      -                 -"
    assert render(finished(), TERMINAL).splitlines()[:17] == [
        "digits: 1437 training and 360 test examples, model of 9,258 parameters",
        "epochs: 2, each of 12 Poisson batches, 120 examples expected, SGD with lr 0.1 and "
        "momentum 0.9, seeds 0 1",
        "target epsilon 3, max_grad_norm 1",
        "flat+input-clipping: max_input_norm 3",
        "backprop: allocation joint, bound exact, max_input_norm none",
        "backprop-layerwise: allocation dimension, bound exact, max_input_norm none",
        "backprop-whitened: allocation joint, bound exact, max_input_norm none, inputs whitened by "
        "pink noise",
        "paper: allocation dimension, bound product, max_input_norm 3",
        "",
        "arm                  accuracy         range  epsilon  delta  noise multiplier  "
        "time per step  peak memory",
        *(f"{row}        4.50 ms     11.0 MiB" for row in rows),
    ]


def test_heading_names_the_options_of_the_arms_asked_for():
    record = finished(("flat", "backprop"), max_input_norm=2.5, normalize=True)
    assert heading(record).splitlines()[3:] == [
        "backprop: allocation joint, bound exact, max_input_norm 2.5, normalize",
    ]


def test_table_of_unknown_memory_and_no_privacy():
    text = render(finished((NON_PRIVATE,), PUBLIC, memory=None), TERMINAL)
    assert "unknown" in text
    assert "target epsilon" not in text


def test_json_holds_every_fact(tmp_path):
    finished().write(tmp_path / "r.json")
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts["plan"]["noise_multiplier"] == 2.0166015625
    arms = {result["arm"]: result for result in facts["results"]}
    assert list(arms) == list(ARMS)
    backprop = arms["backprop"]
    assert (backprop["metric_min"], backprop["metric_max"]) == (0.875, 0.9)
    assert backprop["metric_mean"] == pytest.approx(0.8875)
    assert backprop["epsilon"] == 2.998
    assert backprop["max_input_norm"] is None
    assert arms["flat+input-clipping"]["max_input_norm"] == 3.0
    assert backprop["seconds_per_step"] == pytest.approx(0.0045)
    assert backprop["peak_memory_bytes"] == 11 * 2**20
    assert backprop["seeds"][1]["seed"] == 1
    last = {"epoch": 2, "epsilon": 2.998, "metric": 0.9, "loss": None}
    assert backprop["seeds"][1]["epochs"][1] == last
    assert arms[NON_PRIVATE]["epsilon"] is None


@pytest.mark.parametrize("arms", [ARMS, ("flat",), (NON_PRIVATE,)])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(arms, suffix, tmp_path):
    path = tmp_path / f"plot{suffix}"
    draw(finished(arms, PLAN if arms != (NON_PRIVATE,) else PUBLIC), path)
    start = path.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")
