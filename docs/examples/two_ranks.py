"""Train on two ranks: ``torchrun --nproc-per-node 2 docs/examples/two_ranks.py [ddp|fsdp]``."""

import sys
import warnings

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine

warnings.filterwarnings("ignore", message="Secure RNG turned off")
dist.init_process_group("gloo")
torch.manual_seed(0)  # the same data and model everywhere; noise and samples differ all the same

x = torch.randn(2000, 20)
data = TensorDataset(x, (x[:, :10].sum(1) > x[:, 10:].sum(1)).long())
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
if sys.argv[1:] == ["fsdp"]:
    model = fully_shard(model)
else:
    model = DifferentiallyPrivateDistributedDataParallel(model)

engine = PrivacyEngine()
private, optimizer, loader = engine.make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=2.0),
    data_loader=DataLoader(data, batch_size=100),  # 100 on all ranks together
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    clipping="backprop",
)
for _ in range(3):
    for inputs, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(inputs), labels).backward()
        optimizer.step()

with torch.no_grad():  # on every rank: with shards, each pass waits for all of them
    accuracy = (private(x).argmax(1) == data.tensors[1]).float().mean()
if dist.get_rank() == 0:
    print(f"accuracy {accuracy:.2f}, epsilon {engine.get_epsilon(1e-5):.2f} at delta 1e-5")
dist.destroy_process_group()
