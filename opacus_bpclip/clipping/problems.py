"""Why a budget cannot know which uses of layers belong to one forward pass."""

from __future__ import annotations

_NEEDS_ONE_GRAPH = (
    'allocation="joint" measures all layers before it clips any, so a compiled model must be one '
    "graph, but this model has graph breaks. torch.compile(model, fullgraph=True) shows where. Fix "
    "them, or train without torch.compile, or with "
    'BackpropClipping(allocation="dimension").'
)

_RECURRENT = (
    "{} belongs to a recurrent network, a loop over time steps, which runs in eager mode under "
    'torch.compile. So the model is not one graph, but allocation="joint" needs one graph to '
    "measure all layers before it clips any. Train without torch.compile, or with "
    'BackpropClipping(allocation="equal"), which compiles the layers around the network.'
)

NO_FORWARD = (
    "A compiled part of the model was called outside its model's forward pass, where nothing ties "
    "its rows to the examples of the batch. Call the whole model, and have its forward return "
    "whatever the loss needs."
)

ANOTHER_FORWARD = (
    "The model was called inside its own forward pass, with gradients. It cannot be known which "
    "rows of the two calls belong to one example. Make the inner call under torch.no_grad(), or "
    "write one forward that calls the layers as often as they are needed."
)


def not_one_graph(recurrent: str | None) -> str:
    """Return the message for a compiled model that is several graphs, with a joint budget.

    Args:
        recurrent: the name of a layer of a recurrent network, ``None`` if there is none.
    """
    return _NEEDS_ONE_GRAPH if recurrent is None else _RECURRENT.format(recurrent)
