"""The average of the weights: what it is, that the model keeps its own, and what is judged."""

import pytest
import torch
from torch import nn

from opacus_bpclip.ab import training
from opacus_bpclip.ab.averaging import WeightAverage
from opacus_bpclip.ab.batches import Batch
from opacus_bpclip.ab.results import Plan
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.task import task_of
from opacus_bpclip.jobs.quiet import known_warnings_silenced


def test_it_forgets_faster_in_the_beginning():
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.5)
    own, expected = [3.0, 5.0, -1.0, 4.0, 8.0, 1.0, 2.0, 0.0, 9.0, 7.0, 6.0], None
    for step, value in enumerate(own):
        nn.init.constant_(model.weight, value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == own[-1]


def test_the_models_own_weights_come_back_after_an_error():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    average.update()
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="taken up"), average.in_place():
        raise ValueError("what the metric may do is taken up")
    assert not model.weight.any()


@pytest.mark.parametrize("name", ["non-private", "flat", "ew", "backprop", "paper"])
def test_every_arm_is_judged_by_the_average_and_trains_as_without_it(name):
    settings = Settings(epochs=2, batch_size=1000, arms=(name,), seeds=(0,), lr=0.5, threads=1)
    task = task_of(settings)
    plan = Plan(1 / 2, 2, 1.0, (1.0, 2.0), 9258, 1437, 360)
    weights, judged = [], []
    for decay in (None, 0.9):
        arm = training.start(name, 3, settings.replace(weight_averaging=decay), plan, task)
        expected = None
        with known_warnings_silenced():
            for batch in arm.loader:
                training.step(arm, Batch.of(batch, arm.device))
                if arm.average:
                    arm.average.update()
                latest = torch.cat([p.detach().flatten() for p in arm.model.parameters()])
                expected = latest if expected is None else torch.lerp(expected, latest, 9 / 11)
        weights.append(latest)
        with arm.judged() as model:
            judged.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    assert torch.equal(judged[0], weights[0])
    torch.testing.assert_close(judged[1], expected)
    assert not torch.equal(*judged)


def test_the_metric_is_the_averages(monkeypatch):
    settings = Settings(epochs=1, arms=("flat",), seeds=(0,), threads=1, weight_averaging=0.99)
    task, seen = task_of(settings), []

    def look(model, *_):
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return 0.5

    monkeypatch.setattr(training, "evaluate", look)
    plan = Plan(1 / 12, 12, 1.0, (1.0,), 9258, 1437, 360)
    for decay in (None, 0.99):
        training.train_seed("flat", 0, settings.replace(weight_averaging=decay), plan, task, False)
    latest, average = seen
    assert not torch.allclose(latest, average)
