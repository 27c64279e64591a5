"""What a step of fine-tuning costs: a sentence encoder, by each way of training.

Seconds are those of rounds in which each arm takes one step, in an order drawn anew. Peak memory is
that of a process of its own, in which the arm alone trains. With ``--limit``, a batch is searched
whose process stays just within so many GiB.

    python benchmarks/fine_tuning.py full lora head --batch 32 --length 32 --json costs.jsonl

Each line of the file is one measurement, with everything that it depends on; what the file has
already is not measured again. ``fine_tuning_report.py`` makes tables and curves of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sst2
import torch
from largest_batch import largest_batch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyEngine
from opacus_bpclip.bench.measure import (
    MEMORY_ENVIRONMENT,
    TIME_ENVIRONMENT,
    paired_seconds,
    peaks_of,
)
from opacus_bpclip.jobs.environment import commit, hardware, versions
from opacus_bpclip.jobs.errors import ChildError
from opacus_bpclip.jobs.processes import call_in_child
from opacus_bpclip.jobs.quiet import known_warnings_silenced

ARMS: dict[str, dict[str, Any] | None] = {
    "non-private": None,
    "opacus hooks": {"clipping": "flat", "grad_sample_mode": "hooks"},
    "opacus functorch": {"clipping": "flat", "grad_sample_mode": "functorch"},
    "opacus ghost": {"clipping": "flat", "grad_sample_mode": "ghost"},
    "backprop joint": {"clipping": "backprop"},
    "backprop layerwise": {
        "clipping": "backprop",
        "backprop": BackpropClipping(allocation="dimension"),
    },
}


Size = tuple[int, int]  # tokens of a sentence, sentences of a batch


def make_step(what: str, arm: str, width: int = sst2.WIDTH) -> Callable[[Size], None]:
    """Return a whole step: forward, loss, backward, clipping, noise, Adam, zero_grad."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = sst2.full(width) if what == "full" else getattr(sst2, what)()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-4)
    criterion: Any = nn.CrossEntropyLoss()
    options = ARMS[arm]
    if options is not None:
        model, optimizer, *criteria, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(*_batch((8, 4))), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            criterion=criterion if options.get("grad_sample_mode") == "ghost" else None,
            **options,
        )
        criterion = criteria[0] if criteria else criterion

    def step(size: Size) -> None:
        ids, mask, labels = _batch(size)
        criterion(model(ids, mask), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batch(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    length, batch = size
    mask = torch.ones(batch, length, dtype=torch.long)
    return torch.randint(30_000, (batch, length)), mask, torch.randint(2, (batch,))


def step_seconds(
    what: str, width: int, arms: Sequence[str], sizes: Sequence[Size], rounds: int
) -> list[dict[str, tuple[float, ...]]]:
    """Return of each size the seconds of each round's step by arm."""
    found = []
    with known_warnings_silenced():
        makers = {arm: make_step(what, arm, width) for arm in arms}
        for size in sizes:
            steps = {arm: partial(step, size) for arm, step in makers.items()}
            for step in steps.values():
                step()
            found.append(paired_seconds(steps, "cpu", rounds))
    return found


def peak_bytes(what: str, width: int, arm: str, sizes: Sequence[Size]) -> list[int]:
    """Return of each size what a step needs: weights, gradients, Adam's state, and the rest."""
    found = []
    with known_warnings_silenced():
        step = make_step(what, arm, width)
        for size in sizes:
            step(size)
            peaks = peaks_of(partial(step, size), torch.device("cpu"), steps=1)
            assert peaks is not None, "this platform does not tell"
            found.append(max(peaks))
    return found


def process_bytes(what: str, arm: str, length: int, batch: int) -> int:
    """Return the most that this process has taken: also for programs, and in `make_private`."""
    with known_warnings_silenced():
        step = make_step(what, arm)
        for _ in range(2):  # the first one makes Adam's state
            step((length, batch))
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Results:
    """A file with a line for each measurement, with what it depends on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = [json.loads(line)["of"] for line in lines]

    def add(self, of: Sequence[dict[str, Any]], measure: Callable[[list[int]], Any]) -> None:
        """Add a line for each measurement that the file lacks; an arm that fails leaves why.

        Args:
            of: what each measurement depends on.
            measure: returns the results of those with the given indices.
        """
        missing = [index for index, own in enumerate(of) if own not in self._known]
        if not missing:
            return
        try:
            results = measure(missing)
        except ChildError as error:
            results = [str(error)] * len(missing)
        origin = {"commit": commit(), "hardware": hardware("cpu"), "versions": versions()}
        with self._path.open("a") as file:
            for index, result in zip(missing, results, strict=True):
                print(of[index], result, flush=True)
                file.write(json.dumps({"of": of[index], "result": result, **origin}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=("full", "lora", "head"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch", nargs="+", type=int, default=[32])
    parser.add_argument("--length", nargs="+", type=int, default=[32], help="tokens of a sentence")
    parser.add_argument("--width", nargs="+", type=int, default=[sst2.WIDTH], help="of full alone")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, help="GiB; search the largest batch instead")
    parser.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    results = Results(args.json)
    if args.limit is not None:
        for what, length, arm in itertools.product(args.what, args.length, args.arms):
            peak = partial(call_in_child, process_bytes, what, arm, length)
            of = {"measured": "largest batch", "what": what, "arm": arm, "length": length}
            results.add(
                [of | {"limit": args.limit}],
                lambda _, peak=peak: [largest_batch(peak, args.limit * 2**30)],
            )
        return
    sizes = list(itertools.product(args.length, args.batch))
    for what, width in itertools.product(args.what, args.width):
        of: list[dict[str, Any]]
        of = [{"what": what, "length": length, "batch": batch} for length, batch in sizes]
        if width != sst2.WIDTH:
            of = [own | {"width": width} for own in of]
        for arm in args.arms:
            results.add(
                [{"measured": "peak", "arm": arm} | own for own in of],
                lambda missing, what=what, width=width, arm=arm: call_in_child(
                    peak_bytes,
                    what,
                    width,
                    arm,
                    [sizes[index] for index in missing],
                    environment=MEMORY_ENVIRONMENT,
                ),
            )
        results.add(
            [{"measured": "seconds", "arms": args.arms} | own for own in of],
            lambda missing, what=what, width=width: call_in_child(
                step_seconds,
                what,
                width,
                args.arms,
                [sizes[index] for index in missing],
                args.rounds,
                environment=TIME_ENVIRONMENT,
            ),
        )


if __name__ == "__main__":
    main()
