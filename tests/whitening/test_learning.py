"""What the matrices are learnt from, when, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import BackpropClipHooks, BackpropClipping, InputWhitening, PinkNoise
from tests.checks import Trainer
from tests.whitening.helpers import SHAPE, batch, clipping_of, dense, matrices_of, network


def power_of(columns: Tensor, option: InputWhitening) -> Tensor:
    """Return ``(A / a + damping I) ** -power`` of columns, ``[N, D]``, by another way: the SVD.

    All eigenvalues of ``A`` but the ``rank`` largest are their mean.
    """
    size = columns.shape[1]
    second = columns.T @ columns
    _, values, right = torch.linalg.svd(second / (second.trace() / size))
    if option.rank < size:
        values[option.rank :] = values[option.rank :].mean()
    return (right.T * (values + option.damping) ** -option.power) @ right


@pytest.mark.parametrize("rank", [1, 4, 50])
@pytest.mark.parametrize("max_input_norm", [None, 0.5])
def test_the_matrices_are_powers_of_the_second_moments(
    max_input_norm: float | None, rank: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)
    )
    public = 2 * torch.randn(7, 2, 7, 7).double()
    option = InputWhitening(lambda _: public, power=0.3, damping=0.01, rank=rank)
    clipping = BackpropClipping(whitening=option, max_input_norm=max_input_norm)
    found = matrices_of(Trainer(model, (2, 7, 7), clipping))

    patches = F.unfold(public, 3, stride=2)  # [N, 2 * 9, P]
    largest = patches.view(7, 2, 9, -1).norm(dim=2).amax((1, 2))
    factor = (max_input_norm / largest).clamp(max=1) if max_input_norm else torch.ones(7).double()
    patches = (patches * factor.view(-1, 1, 1)).view(7, 2, 9, -1)
    for group in range(2):
        columns = patches[:, group].transpose(1, 2).reshape(-1, 9)
        torch.testing.assert_close(found["0"][group], power_of(columns, option))
    with torch.no_grad():
        hidden = model[:3](public * factor.view(-1, 1, 1, 1))
    factor = (max_input_norm / hidden.norm(dim=1)).clamp(max=1) if max_input_norm else torch.ones(7)
    torch.testing.assert_close(found["3"][0], power_of(hidden * factor[:, None], option))


def test_they_are_learnt_every_few_steps_from_the_present_weights() -> None:
    steps: list[int] = []
    noise = PinkNoise(SHAPE, count=5)
    option = InputWhitening(lambda step: steps.append(step) or noise(0), every=3)
    trainer = Trainer(network(), SHAPE, BackpropClipping(whitening=option))
    first = matrices_of(trainer)
    for step in range(1, 8):
        trainer.move(*batch(), lr=0.5)
        assert steps == [0, 3, 6][: 1 + step // 3]
        assert torch.equal(first["3"], matrices_of(trainer)["3"]) == (step < 3)
        # Of the model's own input: the same, but for the random search of its directions.
        torch.testing.assert_close(first["0"], matrices_of(trainer)["0"], rtol=1e-9, atol=1e-9)


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode, too, and writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + torch.randn_like(x)


def test_learning_leaves_no_trace() -> None:
    """Also where the public examples are drawn from a seed that would be the noise's."""
    model = nn.Sequential(Noisy(), nn.Linear(4, 3), nn.Sequential(nn.Dropout(0.5)))
    model[2].eval()
    public = torch.ones(3, 4)

    def probes(step: int) -> Tensor:
        torch.manual_seed(0)
        return public

    torch.manual_seed(5)
    state = torch.get_rng_state()
    option = InputWhitening(probes, every=1)
    config = BackpropClipping(whitening=option)
    hooks = BackpropClipHooks(model, config=config, loss_reduction="sum")
    hooks._whitening.follow()
    assert torch.equal(torch.get_rng_state(), state)
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, True, False, False]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(public, torch.ones(3, 4))


def test_random_public_examples_are_others_in_each_step_and_the_same_in_each_run() -> None:
    seen: list[Tensor] = []

    def probes(step: int) -> Tensor:
        seen.append(torch.randn(5, 4))
        return seen[-1]

    for seed in (0, 1):
        torch.manual_seed(seed)
        config = BackpropClipping(whitening=InputWhitening(probes, every=1))
        hooks = BackpropClipHooks(nn.Linear(4, 3), config=config, loss_reduction="sum")
        hooks._whitening.follow()
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_matrices_are_learnt_after_a_checkpoint_was_loaded() -> None:
    option = InputWhitening(PinkNoise(SHAPE, count=5), every=100)
    trainer = Trainer(network(), SHAPE, BackpropClipping(whitening=option))
    first = matrices_of(trainer)["3"]
    with torch.no_grad():
        trainer.plain[0].weight.mul_(torch.tensor([1.0, 0.1, 3.0, 0.5]).view(-1, 1, 1, 1))
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    for learnt in (True, False):
        trainer.step(*batch())
        assert torch.equal(first, matrices_of(trainer)["3"]) != learnt
        first = matrices_of(trainer)["3"]


def test_a_group_without_inputs_keeps_its_matrix_alone() -> None:
    public = torch.randn(5, 2, 7)
    public[:, 0] = 0
    config = BackpropClipping(whitening=InputWhitening(lambda _: public))
    trainer = Trainer(nn.Conv1d(2, 4, 3, groups=2), (2, 7), config)
    one, other = matrices_of(trainer)["(root)"]
    assert torch.equal(one, torch.eye(3).double())
    assert not torch.equal(other, torch.eye(3).double())


def test_no_direction_is_shorter_than_a_hundredth() -> None:
    public = torch.randn(50, 6) * torch.logspace(0, -8, 6)
    option = InputWhitening(lambda _: public, power=0.5, damping=1e-12)
    trainer = Trainer(nn.Linear(6, 2), (6,), BackpropClipping(whitening=option))
    layer = trainer.optimizer._hooks._whitening.layers["(root)"]
    values = torch.linalg.eigvalsh(dense(layer.matrix)[0])
    torch.testing.assert_close(values[-1] / values[0], torch.tensor(100.0).double())
    torch.testing.assert_close(values[-1], layer.matrix.scale[0])


def test_layers_that_are_large_frozen_or_unlike_are_left_as_they_are() -> None:
    model = network()
    model[3].weight.requires_grad_(False)
    option = InputWhitening(PinkNoise(SHAPE, count=5), max_size=9)
    assert set(matrices_of(Trainer(model, SHAPE, BackpropClipping(whitening=option)))) == {"0", "6"}


def test_without_moments_a_matrix_stays_as_it_is() -> None:
    """A dead layer's inputs are zero, and a diverging model's are not finite."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    public = torch.randn(5, 4)
    clipping = BackpropClipping(whitening=InputWhitening(lambda _: public, every=1))
    trainer = Trainer(model, (4,), clipping)
    found = matrices_of(trainer)
    assert torch.equal(found["2"][0], torch.eye(3).double())
    public[0] = float("nan")
    trainer.step(torch.randn(3, 4).double(), torch.randn(3, 2).double())
    assert torch.equal(found["0"], matrices_of(trainer)["0"])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(4, 2)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.embedding(ids), x], dim=1))


def test_probes_may_be_several_arguments_of_any_dtype() -> None:
    found = []
    ids, x = torch.tensor([0, 1, 4]), torch.randn(3, 1)
    for made in ((ids, x), {"x": x, "ids": ids}):
        torch.manual_seed(0)
        config = BackpropClipping(whitening=InputWhitening(lambda _, made=made: made))
        model = TwoInputs().bfloat16()
        hooks = BackpropClipHooks(model, config=config, loss_reduction="sum")
        found.append(dense(hooks._whitening.layers["head"].matrix))
    assert found[0].dtype == torch.float32
    assert torch.equal(*found)
    assert not torch.equal(found[0][0], torch.eye(4))


def test_a_checkpoint_under_another_whitening_is_told() -> None:
    trainers = [
        Trainer(network(), SHAPE, clipping)
        for clipping in (clipping_of(), clipping_of(), clipping_of(power=0.25), clipping_of(rank=3))
    ]
    state = trainers[0].optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainers[1].optimizer.load_state_dict(state)
    for other, told in (
        (trainers[2], r"was \(0.5, .* and is \(0.25,"),
        (trainers[3], r"was .* 32, 1, .* and is .* 3, 1,"),
    ):
        with pytest.warns(UserWarning, match=f"whitening {told}"):
            other.optimizer.load_state_dict(state)


def test_public_examples_are_no_noise_of_a_small_seed() -> None:
    seen = []
    config = BackpropClipping(
        whitening=InputWhitening(lambda _: seen.append(torch.randn(5, 4)) or seen[-1])
    )
    BackpropClipHooks(nn.Linear(4, 3), config=config, loss_reduction="sum")
    for seed in range(100):
        drawn = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        assert not torch.equal(seen[0], drawn)
