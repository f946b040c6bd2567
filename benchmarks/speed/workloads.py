"""The timed workloads, in NumPy, so that every library gets the same numbers.

Images are random, because no time depends on their content.
"""

from dataclasses import dataclass

import numpy as np

SIDE, FILTERS = 28, 64


@dataclass(frozen=True)
class FewShot:
    """The mean meta-gradient of a batch of N-way K-shot tasks, with as many query images as support images.

    The network has four blocks of a 3×3 convolution with stride 2, 64 filters and no bias, batch normalisation and
    ReLU, then a linear layer from 256 features.

    Args:
        name: key in ``ITEMS``.
        ways: number of classes of a task.
        shots: number of support images, and of query images, of each class.
        tasks: number of tasks.
        steps: number of inner gradient steps.
        rate: step size of the inner gradient descent.
        products: number of CG iterations.
        strength: λ of the proximal term.
    """

    name: str
    ways: int
    shots: int
    tasks: int
    steps: int = 16
    rate: float = 0.1
    products: int = 5
    strength: float = 2.0

    @property
    def images(self) -> int:
        """Number of images in a task's support set, and in its query set."""
        return self.ways * self.shots

    def arrays(self, dtype: str) -> dict[str, np.ndarray]:
        """Return the images of both sets, ``[tasks, images, 28, 28, 1]`` in [0, 1], and the labels ``y``.

        The labels have shape ``[images]``, and are the same for both sets and for all tasks.
        """
        random = np.random.default_rng(0)
        shape = (self.tasks, self.images, SIDE, SIDE, 1)
        labels = np.repeat(np.arange(self.ways), self.shots)
        return {"support": random.random(shape).astype(dtype), "query": random.random(shape).astype(dtype), "y": labels}

    def parameters(self, dtype: str) -> dict[str, np.ndarray]:
        """Return the initial parameters, with Glorot's kernels.

        Convolution kernels have shape ``[filters, 9 · input channels]``. The second axis is flattened from
        ``[3, 3, input channels]``: rows, columns, channels.
        """
        random = np.random.default_rng(1)
        found = {}
        for block, channels in enumerate((1, FILTERS, FILTERS, FILTERS)):
            found[f"block{block}.kernel"] = _glorot(random, 9 * channels, FILTERS, 9 * FILTERS).T
            found[f"block{block}.scale"], found[f"block{block}.offset"] = np.ones(FILTERS), np.zeros(FILTERS)
        found["head.kernel"], found["head.bias"] = (
            _glorot(random, 4 * FILTERS, self.ways, self.ways),
            np.zeros(self.ways),
        )
        return {name: value.astype(dtype) for name, value in found.items()}


def _glorot(random, inputs, outputs, fan_out):
    limit = np.sqrt(6 / (inputs + fan_out))
    return random.uniform(-limit, limit, (inputs, outputs))


@dataclass(frozen=True)
class Linear:
    """The hypergradient of a linear model's validation loss with respect to θ, with one penalty ½e^θⱼwⱼ² per feature.

    All libraries evaluate ``steps`` inner gradients with step size 1/L, and bilevel may evaluate one more for its
    report. Optimistix evaluates its first gradient without an update, so it makes one update fewer. All libraries solve
    the adjoint system by conjugate gradients. In Optimistix, CG applies ``tol`` to each entry, and may take ten
    iterations per unknown. In the others, it ends at a relative residual of ``tol`` or after ``iterations`` iterations.

    Args:
        name: key in ``ITEMS``.
        loss: ``"ridge"``, half the mean squared error, or ``"logistic"``.
        features: number of features, and of penalties.
        samples: number of training samples.
        validation: number of validation samples.
        steps: number of inner gradient steps.
        iterations: CG budget, except in Optimistix.
        tol: relative tolerance of CG; in Optimistix also the absolute tolerance.
        penalty: typical size of e^θⱼ, which is this number times a random factor.
    """

    name: str
    loss: str
    features: int = 10_000
    samples: int = 200
    validation: int = 100
    steps: int = 100
    iterations: int = 30
    tol: float = 1e-5
    penalty: float = 8.0

    def arrays(self, dtype: str) -> dict[str, np.ndarray]:
        """Return the data and θ.

        ``x`` has shape ``[samples, features]`` and ``y`` shape ``[samples]``, with ±1 for ``"logistic"``. ``x_val`` and
        ``y_val`` are the validation data, and ``theta`` has shape ``[features]``.
        """
        random = np.random.default_rng(2)
        truth = random.normal(size=self.features) / np.sqrt(self.features)
        x, x_val = (random.normal(size=(n, self.features)) for n in (self.samples, self.validation))
        y, y_val = x @ truth, x_val @ truth
        if self.loss == "logistic":
            y, y_val = np.sign(y), np.sign(y_val)
        theta = np.log(self.penalty) + 0.1 * random.normal(size=self.features)
        found = {"x": x, "y": y, "x_val": x_val, "y_val": y_val, "theta": theta}
        return {name: value.astype(dtype) for name, value in found.items()}

    @property
    def step_size(self) -> float:
        """Step size 1/L of the inner gradient descent.

        L estimates the largest curvature of the inner objective. It is 1.1 times the largest curvature of the loss for
        Gaussian features (by the law of Marchenko and Pastur), plus 1.5 times ``penalty``.
        """
        largest = (1 + np.sqrt(self.features / self.samples)) ** 2 * (0.25 if self.loss == "logistic" else 1.0)
        return 1 / (1.1 * largest + 1.5 * self.penalty)

    def exact(self) -> np.ndarray:
        """Return the exact hypergradient in float64, ``[features]``.

        Newton's method solves the inner problem. Woodbury's identity reduces each system to ``samples`` unknowns.
        """
        a = {name: value.astype(np.float64) for name, value in self.arrays("float32").items()}
        x, y, penalty, n = a["x"], a["y"], np.exp(a["theta"]), self.samples

        def slopes(x, y, w):
            margin = x @ w
            if self.loss == "ridge":
                return margin - y, np.ones(len(y))
            p = 1 / (1 + np.exp(y * margin))
            return -y * p, p * (1 - p)

        def solve(curvature, b):  # (xᵀ diag(curvature) x / n + diag(penalty))⁻¹ b
            scaled = x / penalty
            core = np.diag(n / curvature) + scaled @ x.T
            return b / penalty - scaled.T @ np.linalg.solve(core, scaled @ b)

        w = np.zeros(self.features)
        for _ in range(20):
            slope, curvature = slopes(x, y, w)
            w = w - solve(curvature, x.T @ slope / n + penalty * w)
        outer = a["x_val"].T @ slopes(a["x_val"], a["y_val"], w)[0] / self.validation
        return -penalty * w * solve(slopes(x, y, w)[1], outer)


ITEMS: dict[str, FewShot | Linear] = {
    "W1": FewShot("W1", ways=5, shots=1, tasks=8),
    "W2": FewShot("W2", ways=20, shots=5, tasks=2),
    "ridge": Linear("ridge", "ridge"),
    "logistic": Linear("logistic", "logistic", penalty=4.0),
}
"""Workloads by their names on the command line.

W2 has only two tasks, because the time per task hardly depends on the number of tasks.
"""
