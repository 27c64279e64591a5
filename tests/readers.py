"""A recurrent network that reads sequences, as the tests train it."""

import torch
from opacus.layers import DPLSTM
from opacus.layers.dp_rnn import DPRNNBase
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

FEATURES, HIDDEN, STEPS = 3, 4, 5


class Reader(nn.Module):
    """A recurrent network and a head on its last output, or on the sum of all of them."""

    def __init__(self, kind: type[DPRNNBase] = DPLSTM, *, packed: bool = False, **options) -> None:
        super().__init__()
        self.rnn = kind(FEATURES, HIDDEN, **{"batch_first": True} | options)
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(HIDDEN * directions, 2)
        self.packed = packed
        self.wrap = False

    def forward(self, x: Tensor) -> Tensor:
        if self.wrap:
            return self.head(checkpoint(lambda z: self.rnn(z)[0], x, use_reentrant=False)[:, -1])
        if self.packed:
            # An example's length is its own: where its first feature is last positive.
            steps = torch.arange(1, x.shape[1] + 1)
            lengths = (steps * (x[:, :, 0] > 0)).amax(dim=1).clamp(min=1)
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(pad_packed_sequence(self.rnn(x)[0], batch_first=True)[0].sum(dim=1))
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        y = self.rnn(x)[0]
        return self.head(y[:, -1] if self.rnn.batch_first else y[-1])
