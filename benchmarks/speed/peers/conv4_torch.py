"""The few-shot network in PyTorch, in PyTorch's usual layout of images, [batch, channels, height, width]."""

import os

import torch
import torch.nn.functional as F

from benchmarks.speed.workloads import FewShot

Tensors = dict[str, torch.Tensor]
DEVICE = os.environ.get("SPEED_TORCH_DEVICE", "cpu")
"""PyTorch's name of the device: ``"cpu"`` or ``"cuda"``."""


def start(item: FewShot, dtype: str) -> tuple[Tensors, list[tuple[torch.Tensor, ...]]]:
    """Return the parameters in PyTorch's layouts, and the tasks as (support, labels, query, labels).

    PyTorch is set to use as many threads as the process has cores, and not to use TensorFloat-32 in convolutions on a
    GPU.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.allow_tf32 = False
    parameters = {
        name: to_torch(name, torch.from_numpy(value)).to(DEVICE) for name, value in item.parameters(dtype).items()
    }
    arrays = {name: torch.from_numpy(value).to(DEVICE) for name, value in item.arrays(dtype).items()}
    y = arrays["y"]
    images = [arrays[name].permute(0, 1, 4, 2, 3).contiguous() for name in ("support", "query")]
    return parameters, [(images[0][t], y, images[1][t], y) for t in range(item.tasks)]


def apply(parameters: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[images, ways]``.

    Feature maps of odd size get a row and a column of zeros at their end, as in the JAX network. A map of 7×7 becomes
    one of 4×4.
    """
    for block in range(4):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        x = F.conv2d(x, parameters[f"block{block}.kernel"], stride=2, padding=1)
        scale, offset = parameters[f"block{block}.scale"], parameters[f"block{block}.offset"]
        x = F.relu(F.batch_norm(x, None, None, scale, offset, training=True, eps=1e-5))
    return F.linear(x.flatten(1), parameters["head.kernel"], parameters["head.bias"])


def loss(parameters: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(apply(parameters, x), y)


def to_torch(name: str, value: torch.Tensor) -> torch.Tensor:
    """Convert a parameter from the workload's layout to PyTorch's."""
    if name == "head.kernel":  # Channels are innermost in the workload's features, outermost in PyTorch's.
        return value.reshape(2, 2, -1, value.shape[1]).permute(3, 2, 0, 1).flatten(1).contiguous()
    if name.endswith("kernel"):
        return value.reshape(value.shape[0], 3, 3, -1).permute(0, 3, 1, 2).contiguous()
    return value.clone()


def from_torch(name: str, value: torch.Tensor):
    """Convert a parameter or its gradient from PyTorch's layout to the workload's, as a NumPy array."""
    if name == "head.kernel":
        value = value.reshape(value.shape[0], -1, 2, 2).permute(2, 3, 1, 0).reshape(-1, value.shape[0])
    elif name.endswith("kernel"):
        value = value.permute(0, 2, 3, 1).flatten(1)
    return value.detach().cpu().numpy()
