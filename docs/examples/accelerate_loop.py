"""Train in a loop of accelerate: ``python docs/examples/accelerate_loop.py``, or on two processes
``torchrun --nproc-per-node 2 docs/examples/accelerate_loop.py``."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)  # the same data and model everywhere; noise and samples differ all the same
x = torch.randn(2000, 20)
data = TensorDataset(x, (x[:, :10].sum(1) > x[:, 10:].sum(1)).long())
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

model = accelerator.prepare(model)  # the model alone: the engine makes loader and optimizer
engine = PrivacyEngine()
private, optimizer, loader = engine.make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=2.0),
    data_loader=DataLoader(data, batch_size=100),  # 100 on all processes together
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    clipping="backprop",
)
for _ in range(3):
    for inputs, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(private(inputs), labels))
        optimizer.step()

with torch.no_grad():
    accuracy = (private(x).argmax(1) == data.tensors[1]).float().mean()
# Both have the same model: one noise, and the same steps.
print(f"accuracy {accuracy:.4f}, epsilon {engine.get_epsilon(1e-5):.2f} at delta 1e-5\n", end="")
