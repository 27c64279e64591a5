"""The calls of ``make_private`` that must be refused, with what each must say; other refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data import default_collate as collate

from opacus_bpclip import CoverageError, SeveralOptimizers
from tests.budgets import layerwise
from tests.helpers import FEATURES, dataset, make_private, mlp

SGD, LBFGS = torch.optim.SGD, torch.optim.LBFGS
SAMPLED = (
    "Pass a DataLoader with batch_size (and shuffle=True, if you like) over the items to train "
    "on; torch.utils.data.Subset(dataset, indices) makes a data set of some of them. To keep your "
    "own sampling, with an epsilon that you derive yourself, use "
    "make_private(poisson_sampling=False)."
)


class Endless(IterableDataset):
    def __len__(self) -> int:
        return 32

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*dataset().tensors, strict=True)


def with_half_precision() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES, dtype=torch.float16), *mlp())


def joined(items: list[Any]) -> Any:
    """Return all items in one row, as a collator that packs tokens does."""
    return [part.flatten().unsqueeze(0) for part in collate(items)]


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(FEATURES), *mlp())


def evaluating() -> nn.Module:
    return mlp().eval()


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


def drop_first(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model)[1:])


def uncompile(model: nn.Module) -> nn.Module:
    model._compiled_call_impl = None
    return model


@dataclass(frozen=True)
class Refusal:
    """A call that must be refused; ``repair`` makes its model fit for a correct one."""

    message: str
    options: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = ValueError
    model: Callable[[], nn.Module] = mlp
    repair: Callable[[nn.Module], nn.Module] = lambda model: model


MODE = (
    'grad_sample_mode={mode!r} cannot be used with clipping="backprop", which computes no '
    "grad_sample. Leave grad_sample_mode out."
)
COMPILED = (
    "The model is compiled already, and a compiled graph may ignore hooks that are added later. "
    "Call make_private first, then torch.compile the model that it returns."
)
NOT_A_NORM = "Expected max_grad_norm={value!r} to be a finite number > 0."
A_LIST = (
    "Expected max_grad_norm={value!r} to be one number, the sensitivity of all layers together. "
    "Split it over the layers with BackpropClipping(allocation={{name: share}})."
)

REFUSALS = {
    "unknown option": Refusal(
        "Unknown options for make_private: bakcprop, typo.", {"typo": 1, "bakcprop": None}
    ),
    **{
        f"max_grad_norm {value}": Refusal(NOT_A_NORM.format(value=value), {"max_grad_norm": value})
        for value in (0, -1.0, float("nan"), float("inf"), True, "1", None)
    },
    "max_grad_norm list": Refusal(A_LIST.format(value=[1.0, 1.0]), {"max_grad_norm": [1.0, 1.0]}),
    "max_grad_norm tuple": Refusal(A_LIST.format(value=(1.0,)), {"max_grad_norm": (1.0,)}),
    **{
        f"noise_multiplier {value}": Refusal(
            f"Expected noise_multiplier={value!r} to be a finite number >= 0.",
            {"noise_multiplier": value},
        )
        for value in (-0.1, float("nan"), float("inf"), False, "1", None)
    },
    "loss_reduction": Refusal(
        'Expected loss_reduction=\'none\' to be "mean" or "sum".', {"loss_reduction": "none"}
    ),
    **{
        f"grad_sample_mode {mode}": Refusal(MODE.format(mode=mode), {"grad_sample_mode": mode})
        for mode in ("ghost", "ew", "functorch", "no_op", "ghost_fsdp")
    },
    "rand_on_empty": Refusal(
        "rand_on_empty=True adds a made-up example to empty batches, which would be treated as "
        'data. Leave it out: clipping="backprop" takes steps on empty batches.',
        {"rand_on_empty": True},
    ),
    "backprop as a dict": Refusal(
        "Expected backprop={} to be a BackpropClipping.", {"backprop": {}}
    ),
    "backprop with another clipping": Refusal(
        f"backprop={layerwise()!r} was given with clipping='flat', but needs "
        'clipping="backprop".',
        {"clipping": "flat", "backprop": layerwise()},
    ),
    "backprop as a dict with another clipping": Refusal(
        "backprop={} was given with clipping='per_layer', but needs clipping=\"backprop\".",
        {"clipping": "per_layer", "backprop": {}},
    ),
    "options as clipping": Refusal(
        'Expected clipping to be a name. Pass clipping="backprop" and the options as '
        f"backprop={layerwise()!r}.",
        {"clipping": layerwise()},
    ),
    "allocation": Refusal(
        "allocation does not match the model's trainable layers; no such layer: head; no share "
        "for: 2. Give a share to each of: 0, 2.",
        {"backprop": layerwise(allocation={"0": 1.0, "head": 1.0})},
        error=CoverageError,
    ),
    "half precision": Refusal(
        "Backpropagation clipping cannot bound every trainable parameter of this model:\n"
        "- 0 (Linear): its parameters are torch.float16. This dtype needs a GradScaler, whose "
        "scale depends on the data. Keep trainable parameters in torch.float32 or torch.bfloat16.",
        error=CoverageError,
        model=with_half_precision,
        repair=lambda model: model.float(),
    ),
    "batch norm": Refusal(
        "Backpropagation clipping cannot bound every trainable parameter of this model:\n"
        "- 0 normalises over the batch, so each example's output depends on the other examples. "
        'PrivacyEngine.get_compatible_module(model, clipping="backprop") replaces it. Or use '
        "GroupNorm, or keep it in evaluation mode with running statistics.",
        error=CoverageError,
        model=with_batch_norm,
        repair=drop_first,
    ),
    "evaluation mode": Refusal(
        "Model needs to be in training mode",
        error=UnsupportedModuleError,
        model=evaluating,
        repair=lambda model: model.train(),
    ),
    "nothing to train": Refusal(
        "The model has no trainable parameter. Set requires_grad=True on the layers to train.",
        error=CoverageError,
        model=lambda: mlp().requires_grad_(False),
        repair=lambda model: model.requires_grad_(True),
    ),
    "DataParallel": Refusal(
        'DataParallel is not supported with clipping="backprop". Use one process for each device, '
        "with fully_shard(model) of torch.distributed.fsdp, or opacus.distributed's "
        "DifferentiallyPrivateDistributedDataParallel(model).",
        model=lambda: nn.DataParallel(mlp()),
        repair=lambda model: model.module,
    ),
    "compiled": Refusal(
        COMPILED,
        model=lambda: torch.compile(mlp(), backend="eager"),
        repair=lambda model: model._orig_mod,
    ),
    "compiled in place": Refusal(COMPILED, model=compiled_in_place, repair=uncompile),
    "compiled in part": Refusal(
        COMPILED,
        model=lambda: nn.Sequential(compiled_in_place()),
        repair=lambda model: uncompile(model[0]),
    ),
    "wrapped by Opacus": Refusal(
        "The model is wrapped already (GradSampleModule). Pass the original model: "
        "to_standard_module() or cleanup() removes the wrapping.",
        model=lambda: GradSampleModule(mlp()),
        repair=lambda model: model.to_standard_module(),
    ),
    "wrapped by us": Refusal(
        "The model is wrapped already (BackpropClipModule). Pass the original model: "
        "to_standard_module() or cleanup() removes the wrapping.",
        model=lambda: make_private(mlp()).handle,
        repair=lambda model: model.to_standard_module(),
    ),
    "another model's optimizer": Refusal(
        "Module parameters are different than optimizer Parameters",
        {"optimizer": SGD(mlp().parameters(), lr=0.1)},
    ),
    "iterable data": Refusal(
        "Uniform sampling is not supported for IterableDataset: the items of a stream cannot be "
        f"drawn by index. {SAMPLED}",
        {"data_loader": DataLoader(Endless(), batch_size=8)},
    ),
    "no batch": Refusal(
        f"The data loader has no batch: fewer items than batch_size, and drop_last. {SAMPLED}",
        {"data_loader": DataLoader(dataset(5), batch_size=8, drop_last=True)},
    ),
    "no batch size": Refusal(
        f"The data loader has batch_size=None, so the expected batch size is unknown. {SAMPLED}",
        {"data_loader": DataLoader(dataset(), batch_size=None)},
    ),
    "a batch sampler": Refusal(
        "The data loader has a batch sampler of its own (list), which Poisson sampling would "
        f"replace. {SAMPLED}",
        {"data_loader": DataLoader(dataset(), batch_sampler=[[0, 1], [2, 3]])},
    ),
    "weighted items": Refusal(
        "The data loader's WeightedRandomSampler does not draw each item once. Poisson sampling "
        "would replace it, and change the sampling rate, the expected batch size and the choice "
        f"of items. {SAMPLED}",
        {"data_loader": DataLoader(dataset(), 8, sampler=WeightedRandomSampler([1.0] * 32, 60))},
    ),
    "items drawn again": Refusal(
        "The data loader's RandomSampler does not draw each item once. Poisson sampling would "
        "replace it, and change the sampling rate, the expected batch size and the choice of "
        f"items. {SAMPLED}",
        {"data_loader": DataLoader(dataset(), 8, sampler=RandomSampler(range(32), True))},
    ),
    "fewer items": Refusal(
        "The data loader's RandomSampler does not draw each item once. Poisson sampling would "
        "replace it, and change the sampling rate, the expected batch size and the choice of "
        f"items. {SAMPLED}",
        {"data_loader": DataLoader(dataset(), 8, sampler=RandomSampler(dataset(), num_samples=9))},
    ),
    "an item named twice": Refusal(
        "The data loader's SubsetRandomSampler names an item twice: it would contribute twice to a "
        "step. Name each item once.",
        {"data_loader": DataLoader(dataset(), 8, sampler=SubsetRandomSampler([1, 2, 1]))},
    ),
    "three crops of an item": Refusal(
        "The data loader's collate_fn makes 12 rows of 4 items (crops, views, copies?). The bound "
        "holds for one row of each item: an item with several rows contributes several times as "
        "much. Make one row of each item, for example one crop, drawn anew each time; or make "
        "items that hold all views, which opacus_bpclip.AugmentedViews and FoldViews measure "
        "together.",
        {"data_loader": DataLoader(dataset(), 8, collate_fn=lambda items: collate(3 * items))},
    ),
    "all items in one row": Refusal(
        "The data loader's collate_fn puts all items one after the other into one row (a "
        "flattening or packing collator), and a row counts as one example. Make one row of each "
        "item: pad them to one length, and mask the padding.",
        {"data_loader": DataLoader(dataset(), 8, collate_fn=joined)},
    ),
    "several evaluations a step of one of several": Refusal(
        "LBFGS evaluates the loss several times per step, and each evaluation would be a release "
        "of its own. Use an optimizer that needs one gradient per step, such as SGD or Adam.",
        {
            "optimizer": SeveralOptimizers(
                SGD(mlp().parameters(), lr=0.1), LBFGS(mlp().parameters())
            )
        },
    ),
    "several evaluations a step": Refusal(
        "LBFGS evaluates the loss several times per step, and each evaluation would be a release "
        "of its own. Use an optimizer that needs one gradient per step, such as SGD or Adam.",
        {"optimizer": LBFGS(mlp().parameters())},
    ),
}


def check_raises(call: Callable[[], object], message: str, *, otherwise: str) -> None:
    """A call raises an error whose message contains some text."""
    raised = None
    try:
        call()
    except Exception as error:
        raised = str(error)
    assert raised is not None, otherwise
    assert message in raised
