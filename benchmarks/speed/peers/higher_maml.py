"""higher: MAML by backpropagation through ``item.steps`` inner steps.

This is the gradient of the unrolled steps, not the implicit gradient that this library computes.
"""

import higher
import torch

from benchmarks.speed.peers.conv4_torch import apply, from_torch, start
from benchmarks.speed.workloads import FewShot


class _Network(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self._names = [name.replace(".", "_") for name in parameters]
        for name, value in zip(self._names, parameters.values(), strict=True):
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x):
        return apply({name.replace("_", ".", 1): getattr(self, name) for name in self._names}, x)


def programs(item: FewShot, dtype: str):
    """Return the program ``meta-gradient``."""
    parameters, tasks = start(item, dtype)
    network = _Network(parameters)
    optimiser = torch.optim.SGD(network.parameters(), lr=item.rate)
    cross_entropy = torch.nn.functional.cross_entropy

    def meta():
        network.zero_grad()
        for x, y, query_x, query_y in tasks:
            with higher.innerloop_ctx(network, optimiser, copy_initial_weights=False) as (fast, steps):
                for _ in range(item.steps):
                    steps.step(cross_entropy(fast(x), y))
                (cross_entropy(fast(query_x), query_y) / len(tasks)).backward()
        return {name: from_torch(name, leaf.grad) for name, leaf in zip(parameters, network.parameters(), strict=True)}

    return {"meta-gradient": meta}
