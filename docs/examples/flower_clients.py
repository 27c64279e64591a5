"""Two clients of Flower train one model, each privately: ``python docs/examples/flower_clients.py``."""

import json
import secrets
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine

SPENT = Path("spent")  # each client has a file there, on its own machine
client, server = ClientApp(), ServerApp()


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))


def items_of(number: int) -> TensorDataset:
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(number))
    return TensorDataset(x, (x[:, :10].sum(1) > x[:, 10:].sum(1)).long())


@client.train()
def train(message: Message, context: Context) -> Message:
    number = context.node_config["partition-id"]
    model, data, file = build(), items_of(number), SPENT / f"{number}.json"
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    engine = PrivacyEngine()
    if file.exists():  # the steps of all earlier rounds
        engine.accountant.load_state_dict(json.loads(file.read_text()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(data, batch_size=40, generator=secret()),
        noise_generator=secret(), clipping="backprop",
    )  # fmt: skip
    try:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
    finally:  # before the reply, and also if the round fails
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(engine.accountant.state_dict()))
    metrics = MetricRecord({"num-examples": len(data), "epsilon": engine.get_epsilon(1e-3)})
    reply = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=reply, reply_to=message)


def secret() -> torch.Generator:  # otherwise a seed makes the noise of two rounds equal
    return torch.Generator().manual_seed(secrets.randbits(63))


@server.main()
def main(grid: Grid, context: Context) -> None:
    start = ArrayRecord(build().state_dict())
    FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=start, num_rounds=3)


if __name__ == "__main__":
    run_simulation(server_app=server, client_app=client, num_supernodes=2)
    for file in sorted(SPENT.glob("*.json")):
        print("client", file.stem, "has spent", json.loads(file.read_text())["history"])
