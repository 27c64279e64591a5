"""Every case builds, and every arm takes a step of it or says why it does not."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)

from opacus_bpclip import BackpropClipping, PrivacyEngine
from opacus_bpclip.ab.models import count_parameters
from opacus_bpclip.bench import arms
from opacus_bpclip.bench.cases import batch, build
from opacus_bpclip.bench.settings import ARMS, BACKPROP, CASES, OPACUS, Settings
from opacus_bpclip.engine.module import BackpropClipModule
from opacus_bpclip.jobs.quiet import known_warnings_silenced
from tests.bench.tiny import tiny

EAGER = tuple(arm for arm in ARMS if not arm.endswith("-compiled"))
FAMILIES = sorted({case.family for case in CASES.values()})
CPU = torch.device("cpu")
# The defaults of the version that had no joint budget, so that its numbers can be compared.
BEFORE = BackpropClipping(allocation="dimension", bound="weighted", max_input_norm=3.0)
OPTIONS = {
    "joint-exact": BackpropClipping(),
    "joint-weighted": BackpropClipping(bound="weighted"),
    "joint-product": BackpropClipping(bound="product", max_input_norm=3.0),
    "layerwise-exact": replace(BEFORE, bound="exact"),
    "layerwise-weighted": BEFORE,
    "layerwise-product": BackpropClipping.paper(),
}
WRAPPERS = {
    "hooks": GradSampleModule,
    "functorch": GradSampleModule,
    "ew": GradSampleModuleExpandedWeights,
    "ghost": GradSampleModuleFastGradientClipping,
}
PARAMETERS = {
    "cnn26k": 26_010,
    "resnet18-gn": 11_173_962,
    "transformer": 3_434_506,
    "mlp": 5_824_522,
    "cnn26k-2048": 26_010,
    "transformer-512": 3_549_194,
    "text": 6_417_802,
    "lstm": 100_618,
    "lora": 302_602,
}


@pytest.mark.parametrize("name", CASES)
def test_case_is_what_it_says(name):
    case = tiny(name)
    inputs, labels = batch(case)
    assert build(case)(inputs).shape == (len(labels), 10) == (2, 10)
    with torch.device("meta"):
        assert count_parameters(build(CASES[name])) == PARAMETERS[name]


@pytest.mark.parametrize("axis", ["batch", "width", "depth", "length"])
def test_growth_curve_has_models(axis):
    for point in Settings(growth=axis).points:
        with torch.device("meta"):
            build(point.case)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("arm", EAGER)
def test_a_step_is_whole_and_leaves_nothing_behind(arm, name, monkeypatch):
    built = []
    monkeypatch.setattr(arms, "build", lambda case: built.append(build(case)) or built[-1])
    with known_warnings_silenced():
        step = arms.make_step(arm, tiny(name), CPU)
        trained = [p for p in built[0].parameters() if p.requires_grad]
        before = [p.clone() for p in trained]
        step()
    changed = [not torch.equal(p, old) for p, old in zip(trained, before, strict=True)]
    # Without noise, the bias of an attention's keys does not change: no output depends on it.
    assert all(changed) or (arm == "non-private" and any(changed))
    for p in trained:
        assert getattr(p, "grad_sample", None) is None
        assert getattr(p, "summed_grad", None) is None


class Spy(PrivacyEngine):
    """Remembers what the last call of make_private returned."""

    returned = ()

    def make_private(self, **kwargs):
        Spy.returned = super().make_private(**kwargs)
        return Spy.returned


@pytest.mark.parametrize("arm", BACKPROP + OPACUS)
def test_arm_is_the_method_that_it_is_named_after(arm, monkeypatch):
    monkeypatch.setattr(arms, "PrivacyEngine", Spy)
    with known_warnings_silenced():
        arms.make_step(arm, tiny("mlp"), CPU)
    model, optimizer, *_ = Spy.returned
    assert type(model) is WRAPPERS.get(arm, BackpropClipModule)
    if arm in BACKPROP:
        assert replace(model._config, uses="auto") == OPTIONS[arm]
    if type(model) is GradSampleModule:
        assert model.force_functorch == (arm == "functorch")
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (1.0, 1.0)
    assert optimizer.expected_batch_size == 2


@pytest.mark.parametrize("arm", ["non-private", "joint-exact", "hooks"])
def test_in_low_precision_an_arm_trains_on_sums_by_autocast(arm, monkeypatch):
    monkeypatch.setattr(arms, "PrivacyEngine", Spy)
    seen = []

    def spy(logits, y, **options):
        seen.append((logits.dtype, options["reduction"]))
        return cross_entropy(logits, y, **options)

    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    Spy.returned = ()
    with known_warnings_silenced():
        arms.make_step(arm, tiny("mlp"), CPU, "bfloat16")()
    assert set(seen) == {(torch.bfloat16, "sum")}
    assert all(made.loss_reduction == "sum" for made in Spy.returned[:2])


def test_a_compiled_arm_is_compiled_as_make_private_returned_it(monkeypatch):
    compiled = []

    def compile_eagerly(model):
        compiled.append(model)
        return partial(model)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    with known_warnings_silenced():
        arms.make_step("joint-exact", tiny("mlp"), CPU)()
        assert compiled == []
        arms.make_step("joint-exact-compiled", tiny("mlp"), CPU)()
    assert [type(model) for model in compiled] == [BackpropClipModule]
