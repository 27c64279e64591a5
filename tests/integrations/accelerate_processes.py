"""A loop of accelerate on two processes; the test starts it with torchrun."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine
from tests.integrations.plain import flat

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)  # the wrapper makes the copies equal
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = TensorDataset(torch.ones(64, 4), torch.arange(64) % 3)
    engine = PrivacyEngine()
    model = accelerator.prepare(plain)
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(private(x), y))
        optimizer.step()
    print(f"found {engine.accountant.history} {float(flat(plain).sum())};", flush=True)
