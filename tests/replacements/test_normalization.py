"""The replacements of normalisations over the batch do not mix examples."""

import copy
import warnings

import pytest
import timm
import torch
from opacus.validators.errors import UnsupportedModuleError
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

from opacus_bpclip import CoverageError, PrivacyEngine
from opacus_bpclip.replacements import compatible_copy, normalization
from opacus_bpclip.replacements.normalization import groups_of
from tests.budgets import layerwise
from tests.checks import Trainer, check_training
from tests.helpers import make_private

CHANNELS = [*range(3, 41), 48, 64, 96, 100, 127, 128, 160, 320, 512, 2048]
METHOD = 'PrivacyEngine.get_compatible_module(model, clipping="backprop")'


def compatible(model: nn.Module) -> nn.Module:
    return PrivacyEngine.get_compatible_module(model, clipping="backprop")


@pytest.mark.parametrize("channels", CHANNELS)
def test_groups_divide_the_channels_and_hold_enough_of_them(channels):
    groups = groups_of(channels)
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels // groups >= 8


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", [(), (5,), (1,)], ids=["vectors", "sequences", "one step"])
def test_the_layers_below_get_gradient(channels, shape):
    torch.manual_seed(0)
    made = compatible_copy(nn.BatchNorm1d(channels))
    x = torch.randn(4, channels, *shape, requires_grad=True)
    y = made(x)
    assert y.std() > 0.5
    (gradient,) = torch.autograd.grad((y * torch.randn(y.shape)).sum(), x)
    assert gradient.flatten(1).norm(dim=1).amin() > 0.1


def test_a_network_of_vectors_learns_below_its_normalisation():
    """Opacus's replacement of 32 features is 32 groups of one: a constant."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.zeros(32).long())
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Linear(32, 3))
    theirs = PrivacyEngine.get_compatible_module(copy.deepcopy(model))
    theirs(data.tensors[0]).square().sum().backward()
    assert theirs[0].weight.grad.norm() < 1e-4
    private = make_private(compatible(model), data=data)
    nn.functional.cross_entropy(private.model(data.tensors[0]), data.tensors[1]).backward()
    private.optimizer.step()
    assert private.model._module[0].weight.summed_grad.norm() > 1e-2


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(16), (16,)),
        (lambda: nn.BatchNorm1d(6), (6, 5)),
        (lambda: nn.BatchNorm2d(16), (16, 1, 1)),
        (lambda: nn.BatchNorm2d(1), (1, 4, 4)),
        (lambda: nn.BatchNorm3d(8, affine=False), (8, 2, 2, 2)),
        (lambda: nn.SyncBatchNorm(16), (16, 2, 2)),
        (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 3)),
        (lambda: BatchNormAct2d(16, act_layer=nn.PReLU, inplace=False), (16, 3, 3)),
    ],
)
def test_what_is_put_in_its_place_stays_within_its_sensitivity(make, shape):
    torch.manual_seed(0)
    channels = shape[0]
    first = {1: nn.Linear(channels, channels)}.get(len(shape)) or {
        2: nn.Conv1d,
        3: nn.Conv2d,
        4: nn.Conv3d,
    }[len(shape)](channels, channels, 1)
    model = compatible(nn.Sequential(first, make(), nn.Flatten()))
    trainer = Trainer(model, shape, layerwise(), probe=True)
    x = torch.randn(4, *shape, dtype=torch.float64)
    check_training(trainer, x, torch.randn(4, x[0].numel(), dtype=torch.float64) * 100)


def test_what_can_be_kept_is_kept():
    norm = nn.BatchNorm2d(16, eps=1e-3).to(torch.float64)
    nn.init.normal_(norm.weight)
    norm.bias.requires_grad_(False)
    made = compatible_copy(nn.ModuleDict({"norm": norm.eval()}))["norm"]
    assert type(made) is nn.GroupNorm
    assert torch.equal(made.weight, norm.weight)
    assert (made.weight.requires_grad, made.bias.requires_grad) == (True, False)
    assert (made.eps, made.weight.dtype, made.training) == (1e-3, torch.float64, False)
    assert compatible_copy(nn.BatchNorm2d(16, affine=False)).weight is None


class Renamed(nn.BatchNorm2d):
    """Computes what ``nn.BatchNorm2d`` computes."""


def test_a_subclass_that_changes_nothing_is_replaced():
    assert type(compatible_copy(Renamed(16))) is nn.GroupNorm


@pytest.mark.parametrize("kind", [BatchNormAct2d, SyncBatchNormAct])
def test_what_follows_the_normalisation_in_one_module_stays(kind):
    norm = kind(16)
    norm.act, norm.drop = nn.LeakyReLU(0.2), nn.Dropout(0.3)
    made = compatible_copy(norm)
    assert [type(part) for part in made] == [nn.GroupNorm, nn.Dropout, nn.LeakyReLU]
    assert made.act.negative_slope == 0.2
    x = torch.randn(2, 16, 3, 3)
    expected = nn.functional.leaky_relu(nn.functional.group_norm(x, 2), 0.2)
    assert torch.allclose(made.eval()(x), expected)


def test_a_model_of_such_modules_trains():
    model = compatible(timm.create_model("efficientnet_b0", num_classes=3))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("module", "reason", "remedy"),
    [
        (
            nn.BatchNorm1d(1),
            "has 1 feature, too few to normalise within one example: leave it out "
            "(nn.Identity()), or use nn.GroupNorm(1, 1) if its inputs are sequences, [B, 1, L]",
            nn.Identity(),
        ),
        (
            nn.BatchNorm1d(2),
            "has 2 features, too few to normalise within one example: leave it out "
            "(nn.Identity()), or use nn.GroupNorm(1, 2) if its inputs are sequences, [B, 2, L]",
            nn.GroupNorm(1, 2),
        ),
        (
            SplitBatchNorm2d(16),
            "overrides _BatchNorm.forward, so it is not known what it computes",
            nn.GroupNorm(2, 16),
        ),
    ],
    ids=["one feature", "two features", "own forward"],
)
def test_what_is_not_replaced_is_refused_with_the_reason_and_a_remedy(module, reason, remedy):
    with pytest.raises(CoverageError) as refusal:
        compatible(nn.Sequential(nn.Linear(4, 4), module))
    assert (
        "- 1 normalises over the batch, so each example's output depends on the other examples. "
        f"{METHOD} does not replace it: it {reason}. Or use GroupNorm, or keep it in evaluation "
        "mode with running statistics."
    ) in str(refusal.value)
    compatible(nn.Sequential(nn.Linear(4, 4), remedy))
    module.requires_grad_(False).eval()
    compatible(nn.Sequential(nn.Linear(4, 4), module))


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        return nn.Sequential(nn.Linear(4, 8), nn.LazyBatchNorm1d())


def test_a_lazy_one_is_replaced_once_it_is_initialised():
    model = lazy()
    with pytest.raises(CoverageError) as refusal:
        compatible(model)
    assert str(refusal.value) == (
        "1 (LazyBatchNorm1d) is not initialised yet. Run one batch through the model first."
    )
    with pytest.raises(
        CoverageError, match="it is not initialised yet: run one batch through the "
    ):
        make_private(nn.Sequential(nn.Linear(4, 8), lazy()[1], nn.Linear(8, 3)))
    model(torch.randn(2, 4))
    assert type(compatible(model)[1]) is nn.GroupNorm


def test_hooks_are_not_lost_in_silence():
    norm = nn.BatchNorm1d(8)
    handle = norm.register_forward_hook(lambda *_: None)
    with pytest.raises(
        CoverageError, match="does not replace it: it has hooks, which a replacement"
    ):
        compatible(norm)
    handle.remove()
    compatible(norm)


@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_norm_stops_tracking_and_computes_what_it_did_in_training(affine):
    norm = nn.InstanceNorm2d(4, affine=affine, track_running_stats=True)
    if affine:
        nn.init.normal_(norm.weight)
    made, x = compatible_copy(norm), torch.randn(3, 4, 5, 5)
    assert torch.equal(made(x), norm(x))
    assert not list(made.buffers())
    assert torch.equal(made.eval()(x), made.train()(x))
    assert type(compatible_copy(nn.InstanceNorm2d(4))) is nn.InstanceNorm2d


def test_a_replacement_that_is_a_constant_is_refused(monkeypatch):
    monkeypatch.setattr(normalization, "groups_of", lambda channels: channels)
    with pytest.raises(
        CoverageError, match=r"^1 \(BatchNorm1d\): its replacement, GroupNorm, is not valid: on"
    ):
        compatible_copy(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))


def test_opacus_demands_of_the_whole_model_remain():
    with pytest.raises(UnsupportedModuleError, match="needs to be in training mode"):
        compatible(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval())
