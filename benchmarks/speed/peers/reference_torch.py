"""The computation of the iMAML authors' public script for a batch of tasks, in PyTorch, without its logging.

The program ``meta-gradient`` does what the script does: gradient steps on the support loss alone, one gradient step on
the proximal term, the gradient of the query loss, and conjugate gradients from zero with the operator
v ↦ (1 + 1)v + Hv/(λ + 10). As in the script, λ is 2, vectors are flat, and each product builds the gradient's graph
again.

The program ``paper's operator`` is the paper's algorithm, which this library computes too: gradient steps on the
support loss plus the proximal term, and conjugate gradients from zero with the operator v ↦ v + Hv/λ. It serves to
compare gradients, not times.

Source: github.com/aravindr93/imaml_dev.
"""

import torch

from benchmarks.speed.peers.conv4_torch import from_torch, loss, start
from benchmarks.speed.workloads import FewShot


def programs(item: FewShot, dtype: str):
    """Return the programs ``meta-gradient`` and ``paper's operator``."""
    parameters, tasks = start(item, dtype)
    theta = [value.requires_grad_() for value in parameters.values()]

    def batch(one_task):
        total = torch.zeros_like(_flat(theta))
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
    """Solve ``product(x) = b`` by conjugate gradients from zero with a fixed number of iterations.

    Source: Hestenes and Stiefel (1952).
    """
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
