"""The replacement of ``nn.MultiheadAttention`` computes the same, whatever it is asked."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

from opacus_bpclip.replacements import compatible_copy
from opacus_bpclip.replacements.attention import MultiheadAttention
from opacus_bpclip.replacements.base import Copies

WIDTH, HEADS = 4, 2


def attention(**options) -> nn.MultiheadAttention:
    """All parameters drawn: many are zero before training, and would hide a difference."""
    module = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@st.composite
def options(draw):
    flags = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
    widths = {name: draw(st.sampled_from([None, 3, 5])) for name in ("kdim", "vdim")}
    return {name: draw(st.booleans()) for name in flags} | widths


@st.composite
def masks(draw, batch: int, targets: int, sources: int):
    """Any masks that are accepted, also such as leave a query nothing to attend to."""
    chosen = {}
    shapes = {
        "key_padding_mask": [(batch, sources)],
        "attn_mask": [(targets, sources), (batch * HEADS, targets, sources)],
    }
    for name, possible in shapes.items():
        kind = draw(st.sampled_from([None, torch.bool, torch.float64]))
        if kind is not None:
            mask = torch.randn(draw(st.sampled_from(possible)), dtype=torch.float64)
            chosen[name] = mask > 0.5 if kind is torch.bool else mask
    if draw(st.booleans()):
        causal = nn.Transformer.generate_square_subsequent_mask(targets, dtype=torch.float64)
        chosen |= {"attn_mask": causal[:, :1].expand(-1, sources)}
        if targets == sources:
            chosen |= {"attn_mask": causal, "is_causal": draw(st.booleans())}
    return chosen


@st.composite
def calls(draw):
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    module = attention(**draw(options()))
    # As many examples as steps among them: nothing may take one axis for the other.
    batch, targets, sources = (draw(st.integers(1, 3)) for _ in range(3))
    asked = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    shapes = [(targets, WIDTH), (sources, module.kdim), (sources, module.vdim)]
    inputs = [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]
    itself = targets == sources and module.kdim == module.vdim == WIDTH and draw(st.booleans())
    if itself:
        inputs = inputs[:1] * 3
    if not module.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    return module, inputs, draw(masks(batch, targets, sources)) | asked


def outputs_and_gradients(module: nn.Module, inputs: list[Tensor], options: dict):
    module.zero_grad()
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
        y, weights = module(*inputs, **options)
    (
        y.square().nan_to_num().sum() + (0 if weights is None else weights.nan_to_num().sum())
    ).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return y, weights, [x.grad for x in inputs], gradients


def under_pytorchs_names(made: MultiheadAttention, gradients: dict) -> dict[str, Tensor]:
    """Put gradients where the parameters are, and read them as a state dict."""
    holder = copy.deepcopy(made)
    for name, parameter in holder.named_parameters():
        parameter.data = gradients[name]
    return holder.state_dict()


@given(calls())
def test_outputs_weights_and_gradients_are_pytorchs(call):
    module, inputs, options = call
    made = MultiheadAttention.of(module, Copies())
    y, weights, dx, gradients = outputs_and_gradients(module, inputs, options)
    y2, weights2, dx2, own = outputs_and_gradients(made, inputs, options)
    torch.testing.assert_close((y2, weights2), (y, weights), equal_nan=True)
    if y.isfinite().all():
        torch.testing.assert_close(dx2, dx)
        torch.testing.assert_close(under_pytorchs_names(made, own), gradients)


@pytest.mark.parametrize("batch_first", [True, False])
def test_opacus_own_replacement_computes_another_function(batch_first):
    """Shows why the package has an attention of its own: every model with PyTorch's is refused."""
    torch.manual_seed(0)
    module = attention(batch_first=batch_first).eval()
    x = torch.randn(3, 3, WIDTH, dtype=torch.float64)
    theirs = DPMultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double()
    theirs.load_state_dict(module.state_dict())
    apart = (module(x, x, x)[0] - theirs(x, x, x)[0]).abs().max()
    assert (apart > 0.1) == batch_first
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    made = compatible_copy(module)
    expected = module(x, x, x, attn_mask=mask.double(), is_causal=True)[0]
    assert torch.allclose(made(x, x, x, attn_mask=mask, is_causal=True)[0], expected)
    with pytest.raises(AssertionError, match="do not support causal"):
        theirs(x, x, x, attn_mask=mask, is_causal=True)


@given(options(), st.integers(0, 1000))
@settings(max_examples=30)
def test_state_dicts_load_in_both_directions(options, seed):
    torch.manual_seed(seed)
    one, other = (nn.ModuleDict({"a": nn.ModuleList([attention(**options)])}) for _ in range(2))
    ours = nn.ModuleDict({"a": nn.ModuleList([MultiheadAttention.of(one["a"][0], Copies())])})
    assert list(ours.state_dict()) == list(one.state_dict())
    torch.testing.assert_close(ours.state_dict(), one.state_dict(), rtol=0, atol=0)
    ours.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(ours.state_dict(), other.state_dict(), rtol=0, atol=0)
    one.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_state_dict_that_does_not_fit_is_an_error():
    made, other = compatible_copy(attention()), attention(bias=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj\.bias"):
        made.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        compatible_copy(other).load_state_dict(attention().state_dict())
    kept = made.load_state_dict(other.state_dict(), strict=False)
    assert not kept.unexpected_keys
    assert "q_proj.bias" in kept.missing_keys


def test_flags_dtypes_and_modes_are_kept():
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, add_bias_kv=True).to(torch.bfloat16)
    module.in_proj_weight.requires_grad_(False)
    module.bias_v.requires_grad_(False)
    made = compatible_copy(module.eval())
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    assert frozen == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "added_v.bias"}
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.dropout == 0.3
    assert not any(part.training for part in made.modules())
    assert all(part.training for part in compatible_copy(module.train()).modules())


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_pytorchs(need_weights):
    module = attention(dropout=0.5)
    made, x = compatible_copy(module), torch.randn(3, 2, WIDTH, dtype=torch.float64)
    found = []
    for each in (module, made):
        torch.manual_seed(1)
        found.append(each.train()(x, x, x, need_weights=need_weights))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(made.eval()(x, x, x), module.eval()(x, x, x))


def test_nothing_is_broadcast_in_silence():
    made = compatible_copy(attention(batch_first=True))
    x, mask = torch.zeros(2, 3, WIDTH, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.bool)
    for wrong, message in (
        (
            {"key_padding_mask": mask[:1]},
            r"key_padding_mask of shape \(1, 3\) to have shape \(2, 3\)",
        ),
        (
            {"attn_mask": mask[:1]},
            r"attn_mask of shape \(1, 3\) to have shape \(3, 3\) or \(4, 3, 3\)",
        ),
        ({"attn_mask": mask.expand(2, 3, 3)}, r"\(2, 3, 3\) to have shape \(3, 3\) or \(4, 3, 3\)"),
        ({"attn_mask": mask.int()}, "torch.int32 to be boolean or floating point"),
        ({"is_causal": True}, "needs attn_mask"),
    ):
        with pytest.raises(ValueError, match=message):
            made(x, x, x, **wrong)
    with pytest.raises(ValueError, match="to have the same length"):
        made(x, x, x[:, :2])
    with pytest.raises(ValueError, match="and the 2 examples of query"):
        made(x, x[:1], x[:1])
    with pytest.raises(ValueError, match="to have 3 axes each"):
        made(x, x[0], x[0])
    with pytest.raises(ValueError, match="to be a multiple of num_heads=3"):
        MultiheadAttention(WIDTH, 3)


def test_an_empty_batch_is_a_batch():
    made, x = (
        compatible_copy(attention(batch_first=True, add_bias_kv=True)),
        torch.zeros(0, 3, WIDTH),
    )
    x, masks = x.double(), {"key_padding_mask": torch.zeros(0, 3, dtype=torch.bool)}
    masks["attn_mask"] = torch.zeros(0, 3, 3, dtype=torch.bool)
    for need_weights in (True, False):
        assert made(x, x, x, need_weights=need_weights, **masks)[0].shape == x.shape


def test_a_new_one_is_made_like_pytorchs():
    made = MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, kdim=3, dtype=torch.float64)
    module = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, kdim=3, dtype=torch.float64)
    made.load_state_dict(module.state_dict())
    assert {p.dtype for p in made.parameters()} == {torch.float64}


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor"
)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorchs_encoder_computes_the_same_in_training_and_evaluation(batch_first, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 8, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    # As it is made by default: evaluation then hands nested tensors to a fused kernel.
    model = nn.TransformerEncoder(layer, 2)
    made = compatible_copy(model)
    x, hidden = torch.randn(3, 4, WIDTH), torch.zeros(3, 4, dtype=torch.bool)
    hidden[0, 2:] = True
    added = torch.zeros(3, 4).masked_fill(hidden, -math.inf)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    for options in (
        {},
        {"src_key_padding_mask": hidden},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "src_key_padding_mask": added},
    ):
        for training in (True, False):
            for each in (model, made):
                each.train(training)
            with torch.no_grad():
                y, y2 = (
                    each(x, **options)
                    if batch_first
                    else each(x.transpose(0, 1), **options).transpose(0, 1)
                    for each in (model, made)
                )
            # PyTorch's fused kernel returns zeros for padding, which are not used.
            torch.testing.assert_close(y2[~hidden], y[~hidden], rtol=1e-4, atol=1e-5)
