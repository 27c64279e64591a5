"""Two clients of Flower train one model privately: ``python docs/examples/flower_clients.py``."""

import json
import secrets
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import Linear
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine

client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    number = context.node_config["partition-id"]
    model, file = Linear(20, 2), Path(f"spent-{number}.json")
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(number))  # the client's data
    data = TensorDataset(x, (x[:, :10].sum(1) > x[:, 10:].sum(1)).long())
    # No seed makes these generators equal in two rounds.
    sampling, noise = (torch.Generator().manual_seed(secrets.randbits(63)) for _ in range(2))
    engine = PrivacyEngine()
    if file.exists():  # the steps of earlier rounds
        engine.accountant.load_state_dict(json.loads(file.read_text()))
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), clipping="backprop",
        data_loader=DataLoader(data, batch_size=40, generator=sampling), noise_generator=noise,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    try:
        for inputs, labels in loader:
            optimizer.zero_grad()
            cross_entropy(private(inputs), labels).backward()
            optimizer.step()
    finally:  # also if the round fails; a crash leaves the old file, or the new one
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(engine.accountant.state_dict()))
        unfinished.replace(file)
    metrics = MetricRecord({"num-examples": len(data), "epsilon": engine.get_epsilon(1e-3)})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(Linear(20, 2).state_dict()), num_rounds=3)


if __name__ == "__main__":
    run_simulation(server_app=server, client_app=client, num_supernodes=2)
