"""Ways to be wrong, each patched into the real code, each killed by a check of the suite."""

import pytest
import torch
from torch import nn

from opacus_bpclip import (
    BackpropClipOptimizer,
    BackpropClipping,
    allocation,
    grad_sample_module,
    norms,
    ops,
)
from opacus_bpclip.guard import GradientGuard
from opacus_bpclip.rules import LayerNormRule, base
from tests.checks import (
    Trainer,
    check_independence,
    check_noise_scale,
    check_one_entry_per_step,
    check_sensitivity,
    check_silent,
)


def independence_of_two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    trainer = Trainer(model, (4,), BackpropClipping())
    check_independence(trainer, torch.randn(5, 4).double(), torch.randn(5, 2).double() * 0.1)


def _noisy():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    generator = torch.Generator().manual_seed(0)
    trainer = Trainer(
        model, (20,), BackpropClipping(), noise_multiplier=1.3, noise_generator=generator
    )
    return trainer, torch.randn(4, 20).double(), torch.randn(4, 10).double()


def noise_scale():
    check_noise_scale(*_noisy(), steps=20)


def accounting():
    check_one_entry_per_step(*_noisy(), steps=3)


def sensitivity_below_the_clip():
    trainer = Trainer(nn.Linear(1, 1, bias=False), (1,), BackpropClipping(max_input_norm=1.0))
    x = torch.ones(65, 1, dtype=torch.float64)
    target = torch.full((65, 1), 0.999, dtype=torch.float64)
    target[-1] = -1e6
    check_independence(trainer, x, target)
    check_sensitivity(trainer, x, target)


def sensitivity_with_bias():
    trainer = Trainer(nn.Linear(1, 1), (1,), BackpropClipping(bound="product", max_input_norm=1.0))
    x = torch.full((1, 1), 1e4, dtype=torch.float64)
    check_sensitivity(trainer, x, x.clone())


def weighted_sensitivity_with_bias():
    trainer = Trainer(nn.Linear(1, 1), (1,), BackpropClipping(max_input_norm=1.0))
    x = torch.full((1, 1), 1e4, dtype=torch.float64)
    check_sensitivity(trainer, x, x.clone())


def not_finite():
    trainer = Trainer(nn.Linear(2, 2), (2,), BackpropClipping())
    x = torch.ones(3, 2, dtype=torch.float64)
    x[-1, 0] = float("nan")
    check_silent(trainer, x, torch.ones(3, 2, dtype=torch.float64))


def not_finite_upstream():
    trainer = Trainer(nn.Linear(2, 2), (2,), BackpropClipping())
    target = torch.ones(3, 2, dtype=torch.float64)
    target[-1, 0] = float("inf")
    check_silent(trainer, torch.ones(3, 2, dtype=torch.float64), target)


class Sides(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.layer(x) - self.layer(-x)


def sensitivity_of_two_uses():
    trainer = Trainer(Sides(), (1,), BackpropClipping(uses={"layer": 2}))
    x = torch.full((1, 1), 1e4, dtype=torch.float64)
    check_sensitivity(trainer, x, x.clone())


def sensitivity_of_a_layer_norm_far_from_zero():
    layer = nn.LayerNorm(8, eps=1e-12)
    trainer = Trainer(layer, (3, 8), BackpropClipping(), dtype=torch.float32)
    x = 1e8 + torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    check_sensitivity(trainer, x, torch.ones(2, 24))


def sensitivity_of_a_repeated_token():
    trainer = Trainer(nn.Embedding(2, 1), (9,), BackpropClipping(bound="product"))
    ids = torch.zeros(1, 9, dtype=torch.long)
    check_sensitivity(trainer, ids, torch.ones(1, 9, dtype=torch.float64))


CHECKS = (
    noise_scale,
    accounting,
    sensitivity_below_the_clip,
    sensitivity_with_bias,
    weighted_sensitivity_with_bias,
    not_finite,
    not_finite_upstream,
    sensitivity_of_two_uses,
    sensitivity_of_a_layer_norm_far_from_zero,
    sensitivity_of_a_repeated_token,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_real_code_passes_the_check(check):
    check()


def original_bug(patch):
    """The withdrawn results: the sensitivity divided by the batch size once more."""
    add_noise = BackpropClipOptimizer.add_noise

    def mutant(self):
        noise_multiplier = self.noise_multiplier
        self.noise_multiplier = noise_multiplier / self.expected_batch_size
        add_noise(self)
        self.noise_multiplier = noise_multiplier

    patch.setattr(BackpropClipOptimizer, "add_noise", mutant)


def mean_undone_after_clipping(patch):
    """The repaired reference code: g_i / |B| is clipped."""
    take = GradientGuard.take
    mean_never_undone(patch)

    def mutant(self, parameter):
        gradient = take(self, parameter)
        return gradient if gradient is None else gradient * self._batch_size

    patch.setattr(GradientGuard, "take", mutant)


def mean_never_undone(patch):
    layer_clips = grad_sample_module.layer_clips

    def mutant(*args, mean):
        return layer_clips(*args, mean=False)

    patch.setattr(grad_sample_module, "layer_clips", mutant)


def mean_undone_in_every_layer_anew(patch):
    """What goes on to the layers below is not divided again."""
    attached = ops._attached
    patch.setattr(ops, "_attached", lambda *args, **_: attached(*args[:3], divisor=1))


def bias_uncovered_by_product(patch):
    patch.setattr(norms, "max_column_norm", lambda max_norm, *, weight, bias: max_norm)


def bias_uncovered_by_columns(patch):
    patch.setattr(norms, "column_norms", lambda input_norms, *, weight, bias: input_norms)


def accounted_per_layer(patch):
    pre_step = BackpropClipOptimizer.pre_step

    def mutant(self, closure=None):
        done = pre_step(self, closure)
        for _ in list(self.layer_sensitivities)[1:]:
            self.step_hook(self)
        return done

    patch.setattr(BackpropClipOptimizer, "pre_step", mutant)


def nan_passed_through(patch):
    for module in (ops, base):
        patch.setattr(module, "zero_rows", lambda x, keep: x)


def reuse_counted_once(patch):
    patch.setattr(allocation, "limit_of_each_use", lambda sensitivity, uses: sensitivity)


def means_left_in_normalized_layers(patch):
    """A mean far above the deviations turns rounding errors into normalised values."""
    patch.setattr(LayerNormRule, "centred", lambda self, x: x)


def embedding_positions_not_added_up(patch):
    """The largest position's norm instead of the sum over positions."""

    def mutant(g, largest):
        return torch.linalg.vector_norm(g, dim=2).amax(dim=(1, 2)) * largest

    patch.setattr(norms, "product_bound", mutant)


MUTANTS = [
    (original_bug, noise_scale),
    (mean_undone_after_clipping, sensitivity_below_the_clip),
    (mean_never_undone, sensitivity_below_the_clip),
    (mean_undone_in_every_layer_anew, independence_of_two_layers),
    (bias_uncovered_by_product, sensitivity_with_bias),
    (bias_uncovered_by_columns, weighted_sensitivity_with_bias),
    (accounted_per_layer, accounting),
    (nan_passed_through, not_finite),
    (nan_passed_through, not_finite_upstream),
    (reuse_counted_once, sensitivity_of_two_uses),
    (means_left_in_normalized_layers, sensitivity_of_a_layer_norm_far_from_zero),
    (embedding_positions_not_added_up, sensitivity_of_a_repeated_token),
]


@pytest.mark.parametrize(
    ("mutant", "check"), MUTANTS, ids=[f"{m.__name__} by {c.__name__}" for m, c in MUTANTS]
)
def test_the_mutant_is_killed(mutant, check, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
