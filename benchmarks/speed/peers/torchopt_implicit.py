"""torchopt: ``custom_root`` with ``solve_cg``, for the proximal problem of a task and the penalised linear models."""

import os

import torch
import torch.nn.functional as F
import torchopt

from benchmarks.speed.peers.conv4_torch import from_torch, loss, start
from benchmarks.speed.workloads import FewShot, Linear


def programs(item, dtype: str):
    """Return the program ``meta-gradient`` of a few-shot item, or ``hypergradient`` of a linear item."""
    return _few_shot(item, dtype) if isinstance(item, FewShot) else _linear(item, dtype)


def _few_shot(item: FewShot, dtype: str):
    parameters, tasks = start(item, dtype)
    names = list(parameters)
    theta = tuple(value.requires_grad_() for value in parameters.values())

    def objective(phi, theta, x, y):
        pull = sum(torch.sum((p - t) ** 2) for p, t in zip(phi, theta, strict=True))
        return loss(dict(zip(names, phi, strict=True)), x, y) + 0.5 * item.strength * pull

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(objective, argnums=0),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=item.products, rtol=0.0, atol=0.0),
    )
    def adapt(phi, theta, x, y):
        phi = tuple(leaf.detach().clone().requires_grad_() for leaf in phi)
        for _ in range(item.steps):
            with torch.enable_grad():
                slopes = torch.autograd.grad(objective(phi, theta, x, y), phi)
            phi = tuple((p - item.rate * s).detach().requires_grad_() for p, s in zip(phi, slopes, strict=True))
        return phi

    def meta():
        total = [torch.zeros_like(leaf) for leaf in theta]
        for x, y, query_x, query_y in tasks:
            phi = adapt(theta, theta, x, y)
            slopes = torch.autograd.grad(loss(dict(zip(names, phi, strict=True)), query_x, query_y), theta)
            total = [t + s for t, s in zip(total, slopes, strict=True)]
        return {name: from_torch(name, leaf / len(tasks)) for name, leaf in zip(names, total, strict=True)}

    return {"meta-gradient": meta}


def _linear(item: Linear, dtype: str):
    data = {name: torch.from_numpy(value) for name, value in item.arrays(dtype).items()}
    theta = data["theta"].requires_grad_()
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def mean(margin, y):
        return F.softplus(-y * margin).mean() if item.loss == "logistic" else 0.5 * ((margin - y) ** 2).mean()

    def objective(w, theta):
        return mean(data["x"] @ w, data["y"]) + 0.5 * torch.sum(torch.exp(theta) * w**2)

    slope = torch.func.grad(objective, argnums=0)
    # torchopt's CG stops when ‖r‖ is at most max(rtol‖b‖, atol).
    solve = torchopt.linear_solve.solve_cg(maxiter=item.iterations, rtol=item.tol, atol=0.0)

    @torchopt.diff.implicit.custom_root(slope, argnums=1, solve=solve)
    def fit(w, theta):
        w = w.detach().clone().requires_grad_()
        for _ in range(item.steps):
            with torch.enable_grad():
                (direction,) = torch.autograd.grad(objective(w, theta), w)
            w = (w - item.step_size * direction).detach().requires_grad_()
        return w

    def hypergradient():
        w = fit(torch.zeros_like(theta), theta)
        value = mean(data["x_val"] @ w, data["y_val"])
        return {"theta": torch.autograd.grad(value, theta)[0].numpy()}

    return {"hypergradient": hypergradient}
