"""What a step of fine-tuning costs: a sentence encoder, by each way of training.

Seconds are medians over rounds in which each arm takes one step, in an order drawn anew. Peak
memory is that of a process of its own, in which the arm alone trains. With ``--limit``, the largest
batch is searched whose process stays within so many GiB.

    python benchmarks/fine_tuning.py full lora head --batch 32 --length 32 --json costs.jsonl

Each line of the file is one measurement, with everything that it depends on; what the file has
already is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import opacus
import sst2
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyEngine
from opacus_bpclip.bench.measure import tensor_bytes
from opacus_bpclip.jobs.errors import ChildError, in_one_line
from opacus_bpclip.jobs.memory import PeakMemory
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
WARM_UP = 2
GIB = 2**30


def make_step(what: str, arm: str, batch: int, length: int) -> Callable[[], None]:
    """Return a whole step: forward, loss, backward, clipping, noise, Adam, zero_grad."""
    torch.manual_seed(0)
    model = getattr(sst2, what)().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-4)
    criterion: Any = nn.CrossEntropyLoss()
    ids, mask = torch.randint(30_000, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    labels = torch.randint(2, (batch,))
    options = ARMS[arm]
    if options is not None:
        model, optimizer, *criteria, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(ids, mask, labels), batch_size=batch),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            criterion=criterion if options.get("grad_sample_mode") == "ghost" else None,
            **options,
        )
        criterion = criteria[0] if criteria else criterion

    def step() -> None:
        criterion(model(input_ids=ids, attention_mask=mask), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(what: str, arm: str, batch: int, length: int) -> dict[str, int]:
    """Return this process's peak while the arm trains: in all, and without what programs take."""
    torch.set_num_threads(1)
    with known_warnings_silenced():
        step = make_step(what, arm, batch, length)
        for _ in range(WARM_UP):
            step()
        gc.collect()
        held = tensor_bytes()
        memory = PeakMemory(torch.device("cpu"))
        with memory.watch():
            step()
    assert memory.bytes is not None, "this platform does not tell"
    status = Path("/proc/self/status").read_text()
    whole = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {"bytes": held + memory.bytes, "process_bytes": whole}


def largest_batch(what: str, arm: str, length: int, limit: float) -> int:
    """Return the largest batch, in steps of an eighth, whose process stays within some GiB."""

    def fits(batch: int) -> bool:
        peak = call_in_child(peak_bytes, what, arm, batch, length)
        return peak["process_bytes"] <= limit * GIB

    largest, size = 0, 1
    while fits(size):
        largest, size = size, 2 * size
    for part in (largest // 2, largest // 4, largest // 8):
        if part and fits(largest + part):
            largest += part
    return largest


def step_seconds(
    what: str, arms: Sequence[str], batch: int, length: int, rounds: int
) -> dict[str, list[float] | str]:
    """Return the seconds of each round's step, or why an arm does not run, by arm."""
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], None]] = {}
    results: dict[str, list[float] | str] = {}
    with known_warnings_silenced():
        for arm in arms:
            try:
                step = make_step(what, arm, batch, length)
                for _ in range(WARM_UP):
                    step()
                steps[arm] = step
                results[arm] = []
            except Exception as error:
                results[arm] = in_one_line(error)
        order, shuffle = list(steps), random.Random(0).shuffle
        for _ in range(rounds):
            shuffle(order)
            for arm in order:
                gc.collect()
                start = time.perf_counter()
                steps[arm]()
                seconds = results[arm]
                assert isinstance(seconds, list)
                seconds.append(time.perf_counter() - start)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=("full", "lora", "head"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch", nargs="+", type=int, default=[32])
    parser.add_argument("--length", nargs="+", type=int, default=[32], help="tokens of a sentence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, help="GiB; search the largest batch")
    parser.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    done = (
        [json.loads(line) for line in args.json.read_text().splitlines()]
        if args.json.exists()
        else []
    )
    known = {json.dumps(line["of"]) for line in done}
    versions = {
        "torch": torch.__version__,
        "opacus": opacus.__version__,
        "cpu": platform.processor(),
    }

    def add(measure: Callable[[], Any], **of: Any) -> None:
        if json.dumps(of) in known:
            return
        try:
            result = measure()
        except ChildError as error:
            result = str(error)
        line = {"of": of, "result": result, "versions": versions}
        with args.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(of, result if not isinstance(result, dict) else _shown(result), flush=True)

    for what in args.what:
        for length in args.length:
            for batch in args.batch:
                of = {"what": what, "batch": batch, "length": length}
                times = partial(step_seconds, what, args.arms, batch, length, args.rounds)
                add(partial(call_in_child, times), measured="seconds", **of)
                for arm in args.arms:
                    peak = partial(call_in_child, peak_bytes, what, arm, batch, length)
                    add(peak, measured="peak", arm=arm, **of)
            if args.limit is not None:
                for arm in args.arms:
                    search = partial(largest_batch, what, arm, length, args.limit)
                    of = {"what": what, "length": length, "limit": args.limit}
                    add(search, measured="largest batch", arm=arm, **of)


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    return {
        name: statistics.median(value) if isinstance(value, list) else value
        for name, value in result.items()
    }


if __name__ == "__main__":
    main()
