"""What the iMAML authors' public script computes for a batch of tasks, in PyTorch, without its logging.

``meta-gradient``: plain gradient steps on the support loss, one proximal step, the gradient of the query loss, and
conjugate gradients from zero on (1 + 1)v + Hv/(λ + 10); each product builds the gradient's graph anew, and vectors are
flat. λ is 2.

``paper's operator``: the algorithm of the paper, which this library computes, in the same PyTorch: proximal gradient
steps, conjugate gradients from zero on v + Hv/λ. It is here to compare numbers, not times.
"""

import torch

from benchmarks.speed.peers.conv4_torch import from_torch, loss, start
from benchmarks.speed.workloads import FewShot


def programs(item: FewShot, dtype: str):
    parameters, tasks = start(item, dtype)
    theta = [value.requires_grad_() for value in parameters.values()]

    def batch(one_task):
        total = torch.zeros(sum(leaf.numel() for leaf in theta), dtype=theta[0].dtype)
        for task in tasks:
            total += one_task(item, list(parameters), theta, task)
        return {
            name: from_torch(name, leaf)
            for name, leaf in zip(parameters, _split(total / len(tasks), theta), strict=True)
        }

    return {"meta-gradient": lambda: batch(_reference), "paper's operator": lambda: batch(_paper)}


def _reference(item, names, theta, task):
    phi = [leaf.detach().clone().requires_grad_() for leaf in theta]
    for _ in range(item.steps):
        _descend(phi, _slopes(names, phi, *task[:2]), item.rate)
    _descend(phi, [item.strength * (p - t.detach()) for p, t in zip(phi, theta, strict=True)], item.rate)
    v = _flat(_slopes(names, phi, *task[2:]))

    def product(u):
        return 2.0 * u + _hessian_times(names, phi, task, u) / (item.strength + 10.0)

    return conjugate_gradients(product, v, item.products)


def _paper(item, names, theta, task):
    phi = [leaf.detach().clone().requires_grad_() for leaf in theta]
    for _ in range(item.steps):
        pull = [item.strength * (p - t.detach()) for p, t in zip(phi, theta, strict=True)]
        _descend(phi, [s + p for s, p in zip(_slopes(names, phi, *task[:2]), pull, strict=True)], item.rate)
    v = _flat(_slopes(names, phi, *task[2:]))

    def product(u):
        return u + _hessian_times(names, phi, task, u) / item.strength

    return conjugate_gradients(product, v, item.products)


def conjugate_gradients(product, b, iterations):
    """Hestenes and Stiefel's recursion from zero."""
    x, r, p, squared = torch.zeros_like(b), b, b, b @ b
    for _ in range(iterations):
        image = product(p)
        length = squared / (p @ image)
        x, r = x + length * p, r - length * image
        now = r @ r
        p, squared = r + (now / squared) * p, now
    return x


def _slopes(names, phi, x, y):
    return torch.autograd.grad(loss(dict(zip(names, phi, strict=True)), x, y), phi)


def _hessian_times(names, phi, task, u):
    value = loss(dict(zip(names, phi, strict=True)), *task[:2])
    slopes = torch.autograd.grad(value, phi, create_graph=True)
    return _flat(torch.autograd.grad(_flat(slopes) @ u, phi))


@torch.no_grad()
def _descend(phi, slopes, rate):
    for leaf, slope in zip(phi, slopes, strict=True):
        leaf -= rate * slope


def _flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(flat, like):
    return [piece.reshape(leaf.shape) for piece, leaf in zip(flat.split([x.numel() for x in like]), like, strict=True)]
