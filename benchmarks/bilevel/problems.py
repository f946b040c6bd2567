"""The three problems of the benchmark: their arrays, their losses on a batch, and exact values in float64.

The workers of this library and of the peer, benchmark_bilevel, use the arrays and the losses of this module, so it does
not import ``bilevel``. A loss takes the inner variables z, the outer variables x and a batch, and returns a mean over
the samples of the batch. The exact values are computed by NumPy and SciPy without JAX. They share no code with the
solvers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]
Batch = dict[str, jax.Array]
SMALLEST_CURVATURE, LARGEST_CURVATURE, CROSS_SCALE = 0.1, 1.0, 0.1
PENALTY = 0.2
"""Factor of ‖z‖² in hyper-cleaning."""
CLASSES = 10


@dataclass(frozen=True)
class Data:
    """Arrays of one problem, in float32.

    Args:
        inner: samples of the inner objective; every array has one row for each sample.
        outer: samples of the outer objective.
        z: start of the inner variables.
        x: start of the outer variables.
        test: samples that no algorithm sees; empty for a problem without a test set.
    """

    inner: Arrays
    outer: Arrays
    z: np.ndarray
    x: np.ndarray
    test: Arrays

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of inner and of outer samples."""
        inner, outer = (len(next(iter(part.values()))) for part in (self.inner, self.outer))
        return inner, outer

    def save(self, folder: Path) -> None:
        """Write every array to a file ``GROUP-NAME.npy``, which another process can map into memory."""
        folder.mkdir(parents=True, exist_ok=True)
        for group in ("inner", "outer", "test"):
            for name, array in getattr(self, group).items():
                np.save(folder / f"{group}-{name}.npy", array)
        np.save(folder / "start-z.npy", self.z)
        np.save(folder / "start-x.npy", self.x)

    @staticmethod
    def load(folder: Path) -> "Data":
        """Read what :meth:`save` wrote."""
        groups: dict[str, Arrays] = {"inner": {}, "outer": {}, "test": {}, "start": {}}
        for path in sorted(folder.glob("*.npy")):
            group, name = path.stem.split("-")
            groups[group][name] = np.load(path, mmap_mode="r")
        start = groups.pop("start")
        return Data(z=start["z"], x=start["x"], **groups)

    def shuffled(self, seed: int) -> "Data":
        """Return the data with the inner and the outer samples in random orders.

        Both libraries divide the samples into batches once, and the peer takes the batches of its first epoch in the
        order of the samples. An array ``index`` holds the positions of the samples, so it is not permuted. The entry
        x_i of ``cleaning`` then belongs to another image for each seed.
        """
        rng, parts = np.random.default_rng(seed), []
        for part, size in zip((self.inner, self.outer), self.sizes, strict=True):
            order = rng.permutation(size)
            parts.append({name: array if name == "index" else array[order] for name, array in part.items()})
        return replace(self, inner=parts[0], outer=parts[1])


def _samples_with_curvature(rng, count, spectrum):
    """Return random vectors a_i with E[a_i a_iᵀ] = U diag(spectrum) Uᵀ, where U is a random rotation."""
    size = len(spectrum)
    rotation, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return rng.standard_normal((count, size)) @ (rotation * np.sqrt(spectrum)) @ rotation.T


def _quadratic_samples(rng, count, inner, outer):
    """Return the samples of one objective: for each, Hessians in z and in x, a cross matrix and two linear terms."""
    a = _samples_with_curvature(rng, count, np.geomspace(SMALLEST_CURVATURE, LARGEST_CURVATURE, inner))
    flat = np.append(0.0, np.geomspace(SMALLEST_CURVATURE, LARGEST_CURVATURE, outer - 1))
    b = _samples_with_curvature(rng, count, flat)
    left, _, right = np.linalg.svd(rng.standard_normal((outer, inner)), full_matrices=False)
    c = rng.standard_normal((count, inner))
    cross = (CROSS_SCALE * c @ right.T @ left.T)[:, :, None] * c[:, None, :]
    arrays = {
        "hessian": np.einsum("ni,nj->nij", *[a.astype(np.float32)] * 2),
        "outer_hessian": np.einsum("ni,nj->nij", *[b.astype(np.float32)] * 2),
        "cross": cross,
        "linear": rng.standard_normal((count, inner)),
        "outer_linear": rng.standard_normal((count, outer)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@dataclass(frozen=True)
class Quadratic:
    """Quadratic inner and outer objectives, whose matrices are different for each sample.

    G_i(z, x) = ½zᵀH_i z + xᵀC_i z + l_iᵀz and F_j(z, x) = ½zᵀH_j z + ½xᵀK_j x + xᵀC_j z + l_jᵀz + k_jᵀx. H_i is
    aaᵀ for a normal vector a, whose covariance has eigenvalues from 0.1 to 1. C_i is the outer product of two
    normal vectors, and all singular values of its expectation are 0.1. The value function h is quadratic.
    """

    inner_samples: int = 1024
    outer_samples: int = 1024
    inner_size: int = 100
    outer_size: int = 10

    def data(self, seed: int) -> Data:
        """Draw the samples. Draws whose value function is not strictly convex are discarded."""
        rng = np.random.default_rng(seed)
        while True:
            inner = _quadratic_samples(rng, self.inner_samples, self.inner_size, self.outer_size)
            outer = _quadratic_samples(rng, self.outer_samples, self.inner_size, self.outer_size)
            del inner["outer_hessian"], inner["outer_linear"]  # They do not affect the inner solution.
            z, x = np.zeros(self.inner_size, np.float32), np.full(self.outer_size, -2, np.float32)
            data = Data(inner, outer, z, x, {})
            if np.linalg.eigvalsh(QuadraticReference(data).hessian)[0] > 1e-3:
                return data

    @staticmethod
    def inner(z, x, batch: Batch):
        """Return the inner objective on a batch."""

        def sample(one):
            return 0.5 * z @ (one["hessian"] @ z) + x @ (one["cross"] @ z) + one["linear"] @ z

        return jnp.mean(jax.vmap(sample)(batch))

    @staticmethod
    def outer(z, x, batch: Batch):
        """Return the outer objective on a batch."""

        def sample(one):
            quadratic = 0.5 * z @ (one["hessian"] @ z) + 0.5 * x @ (one["outer_hessian"] @ x)
            return quadratic + x @ (one["cross"] @ z) + one["linear"] @ z + one["outer_linear"] @ x

        return jnp.mean(jax.vmap(sample)(batch))

    @staticmethod
    def reference(data: Data) -> "QuadraticReference":
        """Return the exact value function."""
        return QuadraticReference(data)


class QuadraticReference:
    """The value function of :class:`Quadratic` in closed form: h(x) = ½(x − x*)ᵀ(Hessian)(x − x*) + h*.

    The gap is computed from x − x*, so that it has no rounding error of the size of h*.
    """

    metrics = ("gap", "gradient")

    def __init__(self, data: Data):
        mean = [{name: a.mean(axis=0, dtype=np.float64) for name, a in s.items()} for s in (data.inner, data.outer)]
        self._inner, self._outer = mean
        slope = -np.linalg.solve(self._inner["hessian"], self._inner["cross"].T)  # z*(x) = slope @ x + constant
        constant = -np.linalg.solve(self._inner["hessian"], self._inner["linear"])
        cross = self._outer["cross"] @ slope
        self.hessian = slope.T @ self._outer["hessian"] @ slope + self._outer["outer_hessian"] + cross + cross.T
        linear = slope.T @ (self._outer["hessian"] @ constant + self._outer["linear"])
        linear += self._outer["outer_linear"] + self._outer["cross"] @ constant
        self.minimiser = -np.linalg.solve(self.hessian, linear)
        self._slope, self._constant = slope, constant

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return h(x) and ∇h(x)."""
        x = np.asarray(x, np.float64)
        z, o = self._slope @ x + self._constant, self._outer
        value = 0.5 * z @ o["hessian"] @ z + 0.5 * x @ o["outer_hessian"] @ x + x @ o["cross"] @ z
        value += o["linear"] @ z + o["outer_linear"] @ x
        return float(value), self.hessian @ (x - self.minimiser)

    def measure(self, z: np.ndarray, x: np.ndarray) -> dict[str, float]:
        """Return the gap h(x) − h* and ‖∇h(x)‖."""
        away = np.asarray(x, np.float64) - self.minimiser
        gradient = self.hessian @ away
        return {"gap": float(0.5 * away @ gradient), "gradient": float(np.linalg.norm(gradient))}


@dataclass(frozen=True)
class Logistic:
    """Logistic regression with one penalty exp(x_j) for each feature, and the validation loss as the outer objective.

    The sizes are those of the dataset ijcnn1. The samples are drawn by scikit-learn's ``make_classification``, because
    ijcnn1 cannot be downloaded everywhere. About a tenth of the labels is positive, as in ijcnn1.
    """

    inner_samples: int = 49_990
    outer_samples: int = 91_701
    features: int = 22

    def data(self, seed: int) -> Data:
        """Draw the samples and the starts: z normal, and exp(x) uniform in [0, 1]."""
        from sklearn.datasets import make_classification

        count = self.inner_samples + self.outer_samples
        features, labels = make_classification(
            count, self.features, n_informative=self.features, n_redundant=0, weights=[0.9], random_state=seed
        )
        features, labels = features.astype(np.float32), np.where(labels == 1, 1, -1).astype(np.float32)
        parts = [{"features": features[part], "label": labels[part]} for part in _split(self.inner_samples)]
        rng = np.random.default_rng(seed)
        z, x = rng.standard_normal(self.features), np.log(rng.uniform(size=self.features))
        return Data(parts[0], parts[1], z.astype(np.float32), x.astype(np.float32), {})

    @staticmethod
    def inner(z, x, batch: Batch):
        """Return the inner objective on a batch."""
        return Logistic.outer(z, x, batch) + 0.5 * jnp.dot(jnp.exp(x) * z, z)

    @staticmethod
    def outer(z, x, batch: Batch):
        """Return the mean logistic loss on a batch."""
        return jnp.mean(jax.nn.softplus(-batch["label"] * (batch["features"] @ z)))

    @staticmethod
    def reference(data: Data) -> "LogisticReference":
        """Return the value function, which is computed by Newton's method."""
        return LogisticReference(data)


def _split(count):
    return slice(None, count), slice(count, None)


def _softplus(t):
    return np.maximum(t, 0) + np.log1p(np.exp(-np.abs(t)))


def _sigmoid(t):
    return np.exp(-_softplus(-t))


class LogisticReference:
    """The value function of :class:`Logistic` and its gradient, with the inner problem solved by Newton's method."""

    metrics = ("gap", "gradient")

    def __init__(self, data: Data):
        self._inner, self._outer = [
            -np.asarray(s["label"], np.float64)[:, None] * np.asarray(s["features"], np.float64)
            for s in (data.inner, data.outer)
        ]
        self._z = np.zeros(self._inner.shape[1])
        self._start = np.asarray(data.x, np.float64)
        self._least: float | None = None

    def _solve(self, penalty):
        """Return the inner solution and the Hessian there, by Newton's method with halved steps."""
        rows, z = self._inner, self._z

        def objective(z):
            return np.mean(_softplus(rows @ z)) + 0.5 * penalty @ z**2

        value = objective(z)
        for _ in range(100):
            slope = _sigmoid(rows @ z)
            gradient = rows.T @ slope / len(rows) + penalty * z
            hessian = (rows * (slope * (1 - slope))[:, None]).T @ rows / len(rows) + np.diag(penalty)
            step = np.linalg.solve(hessian, gradient)
            # The objective cannot test a step that lowers it by less than its rounding error. Take this step whole.
            if (expected := gradient @ step) < 1e-14:
                self._z = z - step
                return self._z, hessian
            scale = 1.0
            while (lower := objective(z - scale * step)) > value - 0.1 * scale * expected and scale > 1e-6:
                scale /= 2
            z, value = z - scale * step, lower
        raise ArithmeticError("Newton's method did not converge in 100 steps")

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return h(x) and ∇h(x)."""
        # The limits keep exp(x) finite. Beyond them, h is constant up to rounding.
        penalty = np.exp(np.clip(np.asarray(x, np.float64), -100, 100))
        z, hessian = self._solve(penalty)
        margin = self._outer @ z
        adjoint = np.linalg.solve(hessian, self._outer.T @ _sigmoid(margin) / len(margin))
        return float(np.mean(_softplus(margin))), -penalty * z * adjoint

    @property
    def least(self) -> float:
        """The infimum of h over penalties in [0, ∞), found by L-BFGS-B. It may lie at a penalty of 0."""
        if self._least is None:
            from scipy.optimize import minimize

            def over_penalties(penalty):
                # Penalties below 1e-14 change h by less than its rounding error.
                value, gradient = self.value_and_gradient(np.log(np.maximum(penalty, 1e-14)))
                return value, gradient / np.maximum(penalty, 1e-14)

            # h is not convex, and it is flat in the logarithms of extreme penalties. Therefore L-BFGS-B runs in turn
            # over the logarithms and over the penalties. This is done from two starts, and the smaller minimum counts.
            found = []
            for x in (self._start, np.full_like(self._start, -5)):
                options = {"maxiter": 500, "gtol": 1e-11, "ftol": 0.0, "maxcor": len(x)}
                for _ in range(3):
                    x = minimize(
                        self.value_and_gradient, x, jac=True, method="L-BFGS-B", bounds=[(-32, 20)] * len(x),
                        options=options,
                    ).x  # fmt: skip
                    last = minimize(
                        over_penalties, np.exp(x), jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(x),
                        options=options,
                    )  # fmt: skip
                    x = np.log(np.maximum(last.x, 1e-14))
                found.append((float(last.fun), x))
            self._least, self.minimiser = min(found, key=lambda pair: pair[0])
        return self._least

    def measure(self, z: np.ndarray, x: np.ndarray) -> dict[str, float]:
        """Return the gap h(x) − h* and ‖∇h(x)‖."""
        least = self.least
        value, gradient = self.value_and_gradient(x)
        return {"gap": value - least, "gradient": float(np.linalg.norm(gradient))}


def _augment(rng, images, labels, count):
    """Draw images with replacement, enlarge them to 28 × 28, and rotate, scale and shift each one by a random amount.

    Each pixel of the new image is interpolated bilinearly at a point (r, c) of the old image.
    """
    chosen = rng.integers(len(images), size=count)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    angle, scale = rng.normal(0, 0.15, count), rng.uniform(0.9, 1.15, count)
    shift = rng.uniform(-0.7, 0.7, (2, count))
    grid = (np.arange(28) - 13.5) * 8 / 28
    rows, columns = (part.ravel()[None] for part in np.meshgrid(grid, grid, indexing="ij"))
    cosine, sine = (part[:, None] / scale[:, None] for part in (np.cos(angle), np.sin(angle)))
    r = np.clip(cosine * rows - sine * columns + shift[0][:, None] + 4.5, 0, 8.999)
    c = np.clip(sine * rows + cosine * columns + shift[1][:, None] + 4.5, 0, 8.999)
    i, j = r.astype(int), c.astype(int)
    r, c, image = r - i, c - j, chosen[:, None]
    upper = (1 - c) * padded[image, i, j] + c * padded[image, i, j + 1]
    lower = (1 - c) * padded[image, i + 1, j] + c * padded[image, i + 1, j + 1]
    return (1 - r) * upper + r * lower, labels[chosen]


@dataclass(frozen=True)
class Cleaning:
    """Hyper-cleaning: softmax regression with a weight for each image, if half of the labels are redrawn at random.

    G(z, x) is the mean of sigmoid(x_i) times the cross-entropy of image i, plus 0.2‖z‖². F is the mean cross-entropy of
    validation images, whose labels are right. The images are scikit-learn's digits, enlarged and augmented. Training,
    validation and test images come from different originals.
    """

    inner_samples: int = 20_000
    outer_samples: int = 5_000
    test_samples: int = 5_000

    def data(self, seed: int) -> Data:
        """Draw the images; pixels are standardised by the mean and deviation of the training images."""
        from sklearn.datasets import load_digits

        rng = np.random.default_rng(seed)
        digits = load_digits()
        order = rng.permutation(len(digits.target))
        ends = np.cumsum([int(0.6 * len(order)), int(0.2 * len(order))])
        sizes = self.inner_samples, self.outer_samples, self.test_samples
        groups = []
        for chosen, size in zip(np.split(order, ends), sizes, strict=True):
            image, label = _augment(rng, digits.images[chosen] / 16, digits.target[chosen], size)
            groups.append({"image": image, "label": label.astype(np.int32)})
        inner, outer, test = groups
        noisy = rng.random(self.inner_samples) < 0.5
        inner["label"][noisy] = rng.integers(CLASSES, size=noisy.sum())
        mean, deviation = inner["image"].mean(axis=0), inner["image"].std(axis=0)
        for group in groups:
            group["image"] = ((group["image"] - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
        inner["index"] = np.arange(self.inner_samples, dtype=np.int32)
        z, x = np.zeros(28 * 28 * CLASSES, np.float32), np.full(self.inner_samples, -2, np.float32)
        return Data(inner, outer, z, x, test)

    @staticmethod
    def losses(z, batch: Batch):
        """Return the cross-entropy of each image of a batch."""
        scores = batch["image"] @ z.reshape(-1, CLASSES)
        right = jnp.sum(scores * jax.nn.one_hot(batch["label"], CLASSES, dtype=scores.dtype), axis=1)
        return jax.nn.logsumexp(scores, axis=1) - right

    @staticmethod
    def inner(z, x, batch: Batch):
        """Return the inner objective on a batch.

        In this library and in the peer, a batch is a contiguous slice of the samples, so the outer variables of a batch
        are a slice of x. The derivative of a slice is faster than that of ``x[batch["index"]]``, which is a scatter.
        """
        own = jax.lax.dynamic_slice_in_dim(x, batch["index"][0], len(batch["index"]))
        return jnp.mean(jax.nn.sigmoid(own) * Cleaning.losses(z, batch)) + PENALTY * jnp.sum(z**2)

    @staticmethod
    def outer(z, x, batch: Batch):
        """Return the outer objective on a batch."""
        return jnp.mean(Cleaning.losses(z, batch))

    @staticmethod
    def reference(data: Data) -> "CleaningReference":
        """Return the measures on validation and test images."""
        return CleaningReference(data)


class CleaningReference:
    """Validation loss and test error of a classifier z, in float64."""

    metrics = ("validation_loss", "test_error")

    def __init__(self, data: Data):
        self._outer, self._test = data.outer, data.test

    def measure(self, z: np.ndarray, x: np.ndarray) -> dict[str, float]:
        """Return the validation loss F(z) and the fraction of test images that z classifies wrongly."""
        weights = np.asarray(z, np.float64).reshape(-1, CLASSES)
        scores = self._outer["image"] @ weights
        top = scores.max(axis=1)
        label = self._outer["label"]
        loss = top + np.log(np.exp(scores - top[:, None]).sum(axis=1)) - scores[np.arange(len(label)), label]
        wrong = (self._test["image"] @ weights).argmax(axis=1) != self._test["label"]
        return {"validation_loss": float(loss.mean()), "test_error": float(wrong.mean())}


PROBLEMS: dict[str, Any] = {
    "quadratic": Quadratic(),
    "quadratic-32768": Quadratic(inner_samples=32_768),
    "logistic": Logistic(),
    "cleaning": Cleaning(),
    # Small sizes for tests.
    "tiny-quadratic": Quadratic(64, 48, 6, 3),
    "tiny-logistic": Logistic(600, 500, 5),
    "tiny-cleaning": Cleaning(300, 200, 200),
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """Draw a problem's arrays and write them to a folder, unless they are there; return the folder."""
    found = folder / f"{name}-{seed}"
    if not (found / "problem.json").exists():
        PROBLEMS[name].data(seed).save(found)
        (found / "problem.json").write_text(json.dumps({"problem": name, "seed": seed}))
    return found
