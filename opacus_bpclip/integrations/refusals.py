"""Training arguments of Hugging Face's ``Trainer`` that private training refuses."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset


def refuse(trainer: Any) -> None:
    """Refuse arguments that do not go with private training.

    Args:
        trainer: a ``Trainer``, before it trains.

    Raises:
        ValueError: there is such an argument; the message says why, and what to do instead.
    """
    args = trainer.args
    for name, is_set, text in (
        ("fp16", args.fp16, _FP16),
        ("torch_compile", args.torch_compile, _COMPILED),
        ("auto_find_batch_size", args.auto_find_batch_size, _FIND_BATCH_SIZE),
        (
            f"train_sampling_strategy={args.train_sampling_strategy!r}",
            args.train_sampling_strategy not in ("random", "sequential"),
            _SAMPLING,
        ),
        ("FSDP", trainer.is_fsdp_enabled or bool(args.fsdp), _SHARDED),
        ("DeepSpeed", trainer.is_deepspeed_enabled, _SHARDED),
        (
            f"compute_loss_func={trainer.compute_loss_func!r}",
            trainer.compute_loss_func is not None
            and not hasattr(trainer.compute_loss_func, "reduction"),
            _LOSS,
        ),
        ("train_dataset", isinstance(trainer.train_dataset, IterableDataset), _STREAM),
        (f"One process for {args.n_gpu} GPUs", args.n_gpu > 1, _ONE_PROCESS),
    ):
        if is_set:
            raise ValueError(f"{name} {text}")


_LOSS = (
    "has no attribute `reduction`. Private training needs the loss of each example: pass a module "
    "that is called with (outputs, labels) and has a `reduction`, 'mean', which is set to 'none' "
    "for one loss per example, such as opacus_bpclip.CrossEntropy. docs/hugging-face.md has one."
)
_STREAM = (
    "is a stream, and a Poisson sample holds each item with the same probability, whichever these "
    "are. Pass a data set with a length and access by index, for example "
    "datasets.Dataset.from_generator."
)
OVERRIDDEN_LOSS = (
    "{}.compute_loss does not call that of PrivateTrainer, so nothing bounds what an example "
    "contributes to its loss. Leave compute_loss as it is, and pass compute_loss_func to the "
    "trainer: a module with one loss for each example, as in docs/hugging-face.md."
)
GRAD_SCALER = (
    "needs a GradScaler, which multiplies the loss by a number that depends on the data, so the "
    "clipped gradients would have another scale than the noise."
)
_FP16 = f"{GRAD_SCALER} Train with bf16=True, or in float32."
_COMPILED = (
    "would compile the model as accelerate does it, which not every model's private hooks go with. "
    "Leave torch_compile out. In a loop of your own, compile what make_private returned, as in "
    "docs/compile.md."
)
_FIND_BATCH_SIZE = (
    "begins again after an out-of-memory error, with another batch size: steps would be lost, and "
    "the size of a private sample would decide the batch size. Choose a small "
    "per_device_train_batch_size, the largest number of examples in memory at once, and larger "
    "gradient_accumulation_steps."
)
_SAMPLING = (
    "would draw batches of similar examples, but the accountant counts Poisson samples, which "
    "hold each example independently of all others. Leave train_sampling_strategy out."
)
_SHARDED = (
    "wraps model and optimizer itself, without the private sum over processes. Use torchrun or "
    "accelerate launch with a copy of the model on each process; for shards, write the loop, and "
    "use fully_shard as in docs/many-devices.md."
)
_ONE_PROCESS = (
    "is DataParallel, which copies the model in each pass, without its hooks. Start one process "
    "for each GPU with torchrun or accelerate launch, or hide the others: CUDA_VISIBLE_DEVICES=0."
)
