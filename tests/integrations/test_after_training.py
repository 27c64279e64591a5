"""A trained model leaves: saved, loaded, exported, merged and averaged, it computes the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyEngine, clip_inputs, unclip_inputs
from tests.integrations.plain import CLASSES
from tests.integrations.tiny import TOKENS, bert, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, CLASSES))


def inputs() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def train(
    plain: nn.Module,
    after_step: Callable[[nn.Module], Any] = lambda _: None,
    **options: Any,
) -> nn.Module:
    """Train a model for four steps; return what `make_private` returned."""
    data = TensorDataset(torch.randn(32, 4), torch.arange(32) % CLASSES)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=plain,
        optimizer=torch.optim.SGD(plain.parameters(), lr=0.5),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        backprop=BackpropClipping(**options),
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after_step(model)
    return model


def test_the_weights_fit_a_plain_model() -> None:
    plain = net()
    trained = train(plain).eval()
    fresh = net()
    assert not torch.equal(fresh(inputs()), trained(inputs()))
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.eval()(inputs()), trained(inputs()))


@pytest.mark.parametrize("max_input_norm", [None, 0.5])
@pytest.mark.parametrize("cleaned", [True, False])
def test_export_computes_what_the_trained_model_does(
    max_input_norm: float | None, cleaned: bool
) -> None:
    plain = net()
    trained = train(plain, max_input_norm=max_input_norm).eval()
    expected = trained(inputs()).detach()
    if cleaned:
        trained.cleanup()
    with torch.no_grad():
        exported = torch.export.export(plain.eval(), (inputs(),)).module()
    torch.testing.assert_close(exported(inputs()), expected, rtol=0, atol=1e-6)
    unclipped = net()
    unclipped.load_state_dict(plain.state_dict(), strict=False)
    apart = float((unclipped(inputs()) - expected).abs().max())
    assert (apart > 1e-2) == (max_input_norm is not None)


@pytest.mark.parametrize("cleaned", [True, False])
def test_weights_of_clipped_inputs_do_not_load_without_the_clipping(cleaned: bool) -> None:
    plain = net()
    trained = train(plain, max_input_norm=0.5).eval()
    expected = trained(inputs()).detach()
    if cleaned:
        trained.cleanup()
    saved = plain.state_dict()
    fresh = net()
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "0\.clip_inputs_max_input_norm"'):
        fresh.load_state_dict(saved)
    clip_inputs(fresh, 0.5).load_state_dict(saved)
    torch.testing.assert_close(fresh.eval()(inputs()), expected, rtol=0, atol=1e-6)
    fresh.load_state_dict(unclip_inputs(net()).state_dict())  # of a model without it
    with pytest.warns(UserWarning, match=r"inputs clipped to 0\.5, and are loaded where they are"):
        clip_inputs(copy.deepcopy(fresh), 0.25).load_state_dict(saved)
    unclipped = unclip_inputs(copy.deepcopy(clip_inputs(fresh, 0.5)))
    assert unclipped.state_dict().keys() == net().state_dict().keys()
    assert vars(unclipped[0]).keys() == vars(net()[0]).keys()


@pytest.mark.parametrize("cleaned", [True, False])
def test_torch_finds_every_entry_of_the_state_in_the_model(cleaned: bool) -> None:
    plain = net()
    trained = train(plain, max_input_norm=0.5).eval()
    expected = trained(inputs()).detach()
    if cleaned:
        trained.cleanup()
    with torch.no_grad():
        called = torch.func.functional_call(plain.eval(), plain.state_dict(), (inputs(),))
    torch.testing.assert_close(called, expected, rtol=0, atol=1e-6)
    saved = get_model_state_dict(plain)
    assert saved.keys() == plain.state_dict().keys()
    fresh = clip_inputs(net(), 0.5)
    set_model_state_dict(fresh, saved)
    torch.testing.assert_close(fresh.eval()(inputs()), expected, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "0\.clip_inputs_max_input_norm"'):
        set_model_state_dict(net(), saved)


def test_a_norm_that_was_saved_in_low_precision_is_the_same_one() -> None:
    saved = {name: x.bfloat16() for name, x in clip_inputs(net(), 0.3).state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_inputs(net(), 0.3).load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"clipped to 0\.3008, and are loaded where"):
        clip_inputs(net(), 0.31).load_state_dict(saved)


def test_a_pretrained_model_says_that_its_clipping_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        hf.utils.logging.get_logger("transformers.modeling_utils"),
        "warning",
        lambda text, *_: said.append(str(text)),
    )
    clip_inputs(bert(), 0.5).save_pretrained(tmp_path)
    hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert "clip_inputs_max_input_norm" in "".join(said)


@pytest.mark.slow  # the exporter takes its time; torch.export, which it begins with, is above
@pytest.mark.parametrize("max_input_norm", [None, 0.5])
def test_onnx_computes_what_the_trained_model_does(
    tmp_path: Path, max_input_norm: float | None
) -> None:
    pytest.importorskip("onnxscript", reason="torch's exporter to ONNX needs it")
    runtime = pytest.importorskip("onnxruntime", reason="it runs what was exported")
    plain = net()
    trained = train(plain, max_input_norm=max_input_norm).eval()
    expected = trained(inputs()).detach()
    trained.cleanup()
    file = tmp_path / "model.onnx"
    torch.onnx.export(plain.eval(), (inputs(),), dynamo=True, verbose=False).save(str(file))
    session = runtime.InferenceSession(str(file))
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_an_average_of_weights_follows_private_training(before: bool) -> None:
    plain, seen = net(), []
    made = [AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.5))] if before else []

    def update(model: nn.Module) -> None:
        if not made:
            made.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)))
        made[0].update_parameters(plain if before else model)
        seen.append([p.detach().clone() for p in plain.parameters()])

    train(plain, update)
    expected = seen[0]  # the first update copies
    for now in seen[1:]:
        expected = [0.5 * mean + 0.5 * p for mean, p in zip(expected, now, strict=True)]
    found = list(made[0].module.parameters())
    torch.testing.assert_close(found, expected, check_dtype=True)
    fresh = net()
    with torch.no_grad():
        for p, mean in zip(fresh.parameters(), expected, strict=True):
            p.copy_(mean)
    torch.testing.assert_close(made[0].eval()(inputs()), fresh.eval()(inputs()))


def ids() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(3, TOKENS, (4, 8), generator=drawn)}


def test_a_saved_model_computes_what_the_trained_one_does(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, learning_rate=0.1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(**ids()).logits, run.model.eval()(**ids()).logits)
    assert not torch.equal(loaded(**ids()).logits, bert().eval()(**ids()).logits)


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_train_save_reload_and_merge(tmp_path: Path, dora: bool) -> None:
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], use_dora=dora
    )
    model = peft.get_peft_model(bert(), config)
    begun = bert().eval()(**ids()).logits
    # Trials find the functions that DoRA calls on the layers' weights.
    options = {"privacy": {"backprop": None}} if dora else {}
    run = trainer(tmp_path, model=model, max_steps=2, learning_rate=0.1, **options)
    run.train()
    expected = model.eval()(**ids()).logits
    assert not torch.allclose(expected, begun)
    run.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(**ids()).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**ids()).logits, expected, rtol=0, atol=1e-5)
