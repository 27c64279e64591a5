"""``validate``, ``is_compatible`` and ``get_compatible_module`` know the rules, when asked to."""

from __future__ import annotations

import opacus
import pytest
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import CoverageError, PrivacyEngine
from tests.budgets import layerwise
from tests.helpers import FEATURES, dataset, make_private, mlp, snapshot, train_step

LOADER = DataLoader(dataset(), batch_size=8)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - x.mean(dim=0))


class Sequence(nn.Module):
    """What Opacus replaces: a batch norm, a recurrent network and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(x.unsqueeze(1).expand(-1, 3, -1))[0]
        h = h + self.attention(h, h, h)[0]
        return self.head(self.norm(h.transpose(1, 2)).mean(dim=2))


class Scale(nn.Module):
    """A raw parameter: fine in Opacus until training, and bounded here."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def with_scale() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), Scale(), nn.Linear(8, 3))


def rewritten() -> nn.Module:
    """Fine in Opacus, but the embedding's own forward pass changes its weight."""
    return nn.Sequential(nn.Flatten(), nn.Embedding(8, 3, max_norm=1.0))


@pytest.mark.parametrize(
    ("model", "loader", "reason"),
    [
        pytest.param(
            rewritten(),
            None,
            r"- 1 \(Embedding\): max_norm rewrites .* Leave max_norm out\.",
            id="an option",
        ),
        pytest.param(nn.BatchNorm1d(4), None, "normalises over the batch", id="batch norm"),
        pytest.param(
            nn.LSTM(4, 4),
            None,
            r"\(LSTM\): no rule bounds .*get_compatible_module\(model, clipping=.* replaces it",
            id="lstm",
        ),
        pytest.param(Centred(), LOADER, r"\(root\) \(Centred\) couples examples", id="coupled"),
    ],
)
def test_what_would_be_refused_is_incompatible_and_says_why(
    model: nn.Module, loader: DataLoader | None, reason: str
) -> None:
    engine, before = PrivacyEngine(), snapshot(model)
    arguments = {"module": model, "optimizer": None, "data_loader": loader, "clipping": "backprop"}
    with pytest.raises(CoverageError, match=reason):
        engine.validate(**arguments)
    assert not engine.is_compatible(**arguments)
    assert snapshot(model) == before


@pytest.mark.parametrize("model", [mlp(), with_scale()], ids=["layers", "raw parameter"])
def test_what_would_train_is_compatible(model: nn.Module) -> None:
    arguments = {"module": model, "optimizer": None, "data_loader": LOADER, "clipping": "backprop"}
    PrivacyEngine().validate(**arguments)
    assert PrivacyEngine().is_compatible(**arguments)


def test_a_loss_over_the_batch_is_not_looked_at_without_a_loader() -> None:
    assert PrivacyEngine().is_compatible(module=Centred(), clipping="backprop")


def test_a_promise_is_taken() -> None:
    assert PrivacyEngine().is_compatible(
        module=Centred(),
        data_loader=LOADER,
        clipping="backprop",
        backprop=layerwise(probe=False),
    )


def test_other_clippings_are_judged_by_opacus_alone() -> None:
    for model in (with_scale(), Centred(), nn.BatchNorm1d(4), mlp().eval()):
        arguments = {"module": model, "optimizer": None, "data_loader": LOADER}
        ours, theirs = (
            engine.is_compatible(**arguments)
            for engine in (PrivacyEngine(), opacus.PrivacyEngine())
        )
        assert ours == theirs
    with pytest.raises(UnsupportedModuleError, match="BatchNorm cannot support"):
        PrivacyEngine().validate(module=nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="was given with clipping='flat'"):
        PrivacyEngine().validate(module=mlp(), backprop=layerwise())


def test_opacus_own_demands_hold_as_well() -> None:
    with pytest.raises(UnsupportedModuleError, match="needs to be in training mode"):
        PrivacyEngine().validate(module=mlp().eval(), clipping="backprop")
    assert not PrivacyEngine().is_compatible(module=mlp().eval(), clipping="backprop")


def test_what_opacus_replaces_trains() -> None:
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(Sequence(), clipping="backprop")
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"LSTM", "MultiheadAttention", "GroupNorm"} <= kinds
    private = make_private(model)
    train_step(private)
    assert private.steps == 1


def test_what_nobody_replaces_is_refused_by_name() -> None:
    with pytest.raises(CoverageError, match=r"- 1 \(Embedding\): max_norm rewrites"):
        PrivacyEngine.get_compatible_module(rewritten(), clipping="backprop")
    assert isinstance(PrivacyEngine.get_compatible_module(rewritten())[1], nn.Embedding)


def test_what_needs_no_replacement_stays() -> None:
    made = PrivacyEngine.get_compatible_module(with_scale(), clipping="backprop")
    assert isinstance(made[1], Scale)
