"""The components of a :class:`imaml.Preset`: network, rotations, outer loop, validation and baselines' inner loops."""

from dataclasses import dataclass

import jax

import bilevel as bl
from imaml.errors import check, check_choice
from imaml.learning import networks

CONVOLUTIONS = ("patches", "xla")
"""How a network can compute convolutions, see :func:`imaml.learning.networks.convolution`."""


@dataclass(frozen=True)
class Conv4:
    """The sizes of the convolutional network of Finn et al. (2017); see :func:`imaml.learning.networks.conv4`.

    Args:
        filters: channels of each block.
        kernel_gain: factor on Glorot's initial kernels.
        head_gain: factor on Glorot's initial matrix of the linear layer.
        head_bias: the initial biases of the linear layer are uniform between 0 and this number.
        pooling: if True, stride 1 and 2×2 max-pooling, as for Mini-ImageNet. If False, stride 2 without pooling.
        image_shape: height, width and channels.
        convolutions: ``"patches"`` or ``"xla"``, see :func:`imaml.learning.networks.convolution`.
        products: precision of matrix products and convolutions: ``"float32"``, ``"tensorfloat32"`` or ``"bfloat16"``,
            see :data:`imaml.learning.networks.PRODUCTS`. On a CPU, only XLA's convolution with ``"bfloat16"`` rounds.
            All other products are computed in float32.

    Raises:
        InputError: if ``filters`` is below 1, if a gain is not above 0, if ``head_bias`` is negative, or if a word is
            unknown.
    """

    filters: int = 64
    kernel_gain: float = 1.0
    head_gain: float = 1.0
    head_bias: float = 0.0
    pooling: bool = False
    image_shape: tuple[int, int, int] = (28, 28, 1)
    convolutions: str = "patches"
    products: str = "float32"

    def __post_init__(self):
        check(self.filters >= 1, f"network.filters must be at least 1, got {self.filters}")
        check(self.kernel_gain > 0, f"network.kernel_gain must be above 0, got {self.kernel_gain}")
        check(self.head_gain > 0, f"network.head_gain must be above 0, got {self.head_gain}")
        check(self.head_bias >= 0, f"network.head_bias must be at least 0, got {self.head_bias}")
        check_choice("network.convolutions", self.convolutions, CONVOLUTIONS)
        check_choice("network.products", self.products, tuple(networks.PRODUCTS))

    def build(self, ways: int) -> networks.Network:
        """Return the network with ``ways`` logits."""
        return self._build(ways, jax.nn.relu, networks.max_pool)

    def smooth_variant(self, ways: int) -> networks.Network:
        """Return a network of the same sizes, with scaled softplus and mean-pooling instead of ReLU and max-pooling."""
        return self._build(ways, networks.smooth_relu, networks.mean_pool)

    def _build(self, ways, activation, pool):
        return networks.conv4(
            ways, self.filters, self.image_shape, self.kernel_gain, activation, self.head_gain, self.head_bias,
            pool if self.pooling else None, self.convolutions, self.products,
        )  # fmt: skip


@dataclass(frozen=True)
class MLP:
    """The size of the regression network of Finn et al. (2017): one input and two hidden layers.

    Args:
        hidden: units of each hidden layer.

    Raises:
        InputError: if ``hidden`` is below 1.
    """

    hidden: int = 40

    def __post_init__(self):
        check(self.hidden >= 1, f"network.hidden must be at least 1, got {self.hidden}")

    def build(self, outputs: int) -> networks.Network:
        """Return the network with ``outputs`` output units."""
        return networks.mlp((1, self.hidden, self.hidden, outputs))

    def smooth_variant(self, outputs: int) -> networks.Network:
        """Return a smooth network of the same sizes, with a scaled softplus instead of ReLU."""
        return networks.mlp((1, self.hidden, self.hidden, outputs), networks.smooth_relu)


@dataclass(frozen=True)
class Rotations:
    """Switches for rotating the images of each class of a task by a random multiple of 90°.

    Args:
        train: rotate in training, so that each training class appears as four classes.
        test: rotate in evaluation.
    """

    train: bool = False
    test: bool = False


@dataclass(frozen=True)
class Outer:
    """The outer loop: Adam on the meta-gradient.

    Args:
        learning_rate: Adam's learning rate at the first meta-step.
        tasks: tasks in a meta-step.
        queries: query images of each class of a training task, or query points of a training curve.
        steps: meta-steps of a run.
        final_fraction: learning rate at the end of the run as a fraction of the first. In between, the rate follows
            half a cosine. With 1, the rate is constant.
        epsilon: Adam's ε.
        at_once: tasks that a device computes together; see :func:`imaml.meta_gradient`.

    Raises:
        InputError: if a number is out of range.
    """

    learning_rate: float
    tasks: int
    queries: int
    steps: int
    final_fraction: float = 1.0
    epsilon: float = 1e-8
    at_once: int = 1

    def __post_init__(self):
        check(self.learning_rate > 0, f"outer.learning_rate must be above 0, got {self.learning_rate}")
        check(self.tasks >= 1, f"outer.tasks must be at least 1, got {self.tasks}")
        check(self.queries >= 1, f"outer.queries must be at least 1, got {self.queries}")
        check(self.steps >= 1, f"outer.steps must be at least 1, got {self.steps}")
        check(0 <= self.final_fraction <= 1, f"outer.final_fraction must lie in [0, 1], got {self.final_fraction}")
        check(self.epsilon > 0, f"outer.epsilon must be above 0, got {self.epsilon}")
        check(self.at_once >= 1, f"outer.at_once must be at least 1, got {self.at_once}")


@dataclass(frozen=True)
class Validation:
    """Evaluations on validation classes during training, which choose the best meta-step and may stop the run.

    By default there are none. The tasks are drawn as in an evaluation, and are the same at every validation.

    Args:
        every: meta-steps between two validations. The last meta-step is validated too. 0 for no validation.
        tasks: tasks of each validation.
        patience: stop the run after this number of validations in a row of which none was better than the best one
            before them. 0 for a run that never stops early.
        held_out: the fraction of the training classes that are held out as validation classes, if the dataset has none
            of its own. They are chosen by a permutation with a fixed seed, and are never trained on.

    Raises:
        InputError: if a number is out of range. :func:`imaml.train` refuses ``patience`` or ``held_out`` without
            ``every``.
    """

    every: int = 0
    tasks: int = 100
    patience: int = 0
    held_out: float = 0.0

    def __post_init__(self):
        check(self.every >= 0, f"validation.every must be at least 0, got {self.every}")
        check(self.tasks >= 2, f"validation.tasks must be at least 2, got {self.tasks}")
        check(self.patience >= 0, f"validation.patience must be at least 0, got {self.patience}")
        check(0 <= self.held_out < 1, f"validation.held_out must be at least 0 and below 1, got {self.held_out}")


NO_VALIDATION = Validation()
"""No evaluations during training."""


@dataclass(frozen=True)
class Adaptation:
    """The inner loop of MAML, first-order MAML or Reptile.

    Args:
        inner: gradient descent on the support loss, without a proximal term.
        test_steps: inner steps in evaluation; 0 for as many as in training.
    """

    inner: bl.GradientDescent
    test_steps: int = 0


@dataclass(frozen=True)
class Baselines:
    """The inner loops that a preset uses if its algorithm is changed from implicit MAML to another one.

    Args:
        maml: the inner loop of MAML and of first-order MAML.
        reptile: the inner loop of Reptile.
    """

    maml: Adaptation
    reptile: Adaptation

    def of(self, algorithm: str) -> Adaptation:
        """Return the inner loop of ``algorithm``: ``"maml"``, ``"fomaml"`` or ``"reptile"``."""
        return self.reptile if algorithm == "reptile" else self.maml
