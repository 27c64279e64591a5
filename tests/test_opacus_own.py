"""Opacus's own tests of its privacy engine, run with ``clipping="backprop"``.

Its classes for other ways to make per-example gradients would repeat those for hooks, and tests
that it has switched off itself run nowhere. A test that cannot pass is listed with the reason; it
must fail, or it is to be taken off the list.
"""

from __future__ import annotations

import unittest
from types import ModuleType
from typing import Any

import opacus
import pytest
from opacus.tests import (
    batch_memory_manager_test,
    gradient_accumulation_test,
    privacy_engine_test,
    privacy_engine_validation_test,
)

from opacus_bpclip import PrivacyEngine
from opacus_bpclip.engine import extensions
from tests.budgets import layerwise

MODULES: tuple[ModuleType, ...] = (
    privacy_engine_test,
    batch_memory_manager_test,
    gradient_accumulation_test,
    privacy_engine_validation_test,
)
OTHER_MODES = ("Functorch", "ExpandedWeights", "_ew", "_functorch")
# They make a model private that does not fit the data: nothing could be counted.
NOT_RUN = ("test_model_validator_after_fix", "test_validator_weight_update_check")


class Engine(PrivacyEngine):
    """An engine that clips by backpropagation where the caller says nothing of clipping."""

    uses: Any = {}  # noqa: RUF012 (set by the test)

    def make_private(self, **kwargs: Any) -> Any:
        if getattr(self, extensions._REQUEST, None) is not None:  # called by the next one
            return super().make_private(**kwargs)
        return self._made(super().make_private, kwargs)

    def make_private_with_epsilon(self, **kwargs: Any) -> Any:
        return self._made(super().make_private_with_epsilon, kwargs)

    def _made(self, make: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("clipping") == "per_layer":
            kwargs["max_grad_norm"] = sum(norm**2 for norm in kwargs["max_grad_norm"]) ** 0.5
        # What the method does without input clipping is what Opacus's tests know.
        backprop = layerwise(bound="exact", max_input_norm=None, uses=self.uses)
        made = make(**{**kwargs, "clipping": "backprop", "backprop": backprop})
        made[1].keep_summed_grad = True
        return made

    @classmethod
    def get_compatible_module(cls, module: Any, **_: Any) -> Any:
        return opacus.PrivacyEngine.get_compatible_module(module)


NO_GRAD_SAMPLE = "no parameter has a grad_sample"
SHARES = "each layer has a part of max_grad_norm, so one example does not always reach the whole"
LAYER_IN_FORWARD = "a layer made of raw parameters needs a rule"
REASONS: dict[str, str] = {
    "test_sample_grad_aggregation": NO_GRAD_SAMPLE,
    "test_privacy_engine_no_poisson_accumulation": NO_GRAD_SAMPLE,
    "test_flat_clipping": SHARES,
    "test_per_layer_clipping": "clips parameters apart, this method layers",
    "test_batch_splitter_zero_grad": (
        "zero_grad() between physical batches may be left out: nothing would count twice"
    ),
    "test_unsupported_hooks": LAYER_IN_FORWARD,
    "test_custom_linear_hooks": LAYER_IN_FORWARD,
    "test_extra_param_hooks_requires_grad": LAYER_IN_FORWARD,
    **dict.fromkeys(
        [f"PrivacyEngineCustomLayer{kind}.test_noise_level" for kind in ("Test", "HooksTest")],
        "squares 160 numbers drawn from one seed: 15 % off is 1.3 standard errors",
    ),
    **dict.fromkeys(
        [
            f"PrivacyEngineText{kind}.test_make_private_with_epsilon"
            for kind in ("Test", "HooksTest")
        ],
        "says batch_first=True of a model whose attention has the batch second: examples attend to "
        "each other",
    ),
}


def _is_left_out(kind: type[unittest.TestCase], test: str) -> bool:
    """Return whether Opacus runs the test nowhere, with any engine."""
    return any(getattr(own, "__unittest_skip__", False) for own in (kind, getattr(kind, test)))


def _tests() -> list[Any]:
    found = []
    for module in MODULES:
        for name, kind in vars(module).items():
            own = isinstance(kind, type) and issubclass(kind, unittest.TestCase)
            if not own or kind.__module__ != module.__name__ or name.endswith(OTHER_MODES):
                continue
            for test in unittest.TestLoader().getTestCaseNames(kind):
                if test.endswith(OTHER_MODES) or _is_left_out(kind, test):
                    continue
                reason = REASONS.get(f"{name}.{test}") or REASONS.get(test, "")
                found.append(pytest.param(kind, test, reason, id=f"{name}.{test}"))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "test", "fails_since"), _tests())
def test_passes_unless_there_is_a_reason(
    kind: type[unittest.TestCase], test: str, fails_since: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = "Tied" in kind.__name__ and test not in NOT_RUN
    monkeypatch.setattr(Engine, "uses", "auto" if counted else {})
    for module in MODULES:
        monkeypatch.setattr(module, "PrivacyEngine", Engine)
    result = unittest.TestResult()
    kind(test).run(result)
    assert not result.skipped
    failed = result.failures + result.errors
    if fails_since:
        assert failed, f"passes now, and must leave REASONS: {fails_since}"
        return
    for _, trace in failed:
        raise AssertionError(trace)
