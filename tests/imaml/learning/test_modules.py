"""Tests of networks made from Flax and Equinox modules: outputs, batch statistics, and runs."""

from dataclasses import dataclass
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_preset import dataset, tiny_preset

import imaml
from imaml import InputError

pytestmark = pytest.mark.usefixtures("quick_compilation")
HAS = {name: find_spec(name) is not None for name in ("flax", "equinox")}
if HAS["flax"]:
    from flax import linen as nn
    from flax import nnx
if HAS["equinox"]:
    import equinox as eqx
NEEDS = {"linen": "flax", "nnx": "flax", "equinox": "equinox"}
LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(not HAS[extra], reason=f"needs the extra {extra}"))
    for name, extra in NEEDS.items()
]
INPUTS, HIDDEN, OUTPUTS, EPSILON = 6, 8, 3, 1e-5


if HAS["flax"]:

    class LinenNet(nn.Module):
        norm: str
        momentum: float = 0.0

        def setup(self):
            self.first, self.head = nn.Dense(HIDDEN), nn.Dense(OUTPUTS)
            if self.norm == "batch":
                self.normalise = nn.BatchNorm(momentum=self.momentum)
            else:
                self.normalise = nn.GroupNorm(num_groups=2, epsilon=EPSILON)

        def features(self, x, train):
            x = self.first(x)
            x = self.normalise(x, use_running_average=not train) if self.norm == "batch" else self.normalise(x)
            return nn.relu(x)

        def __call__(self, x, train):
            return self.head(self.features(x, train))


if HAS["flax"]:

    class NnxNet(nnx.Module):
        def __init__(self, norm, rngs):
            self.first, self.head = nnx.Linear(INPUTS, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, OUTPUTS, rngs=rngs)
            kinds = {
                "batch": nnx.BatchNorm,
                "group": lambda size, rngs: nnx.GroupNorm(size, 2, epsilon=EPSILON, rngs=rngs),
            }
            self.normalise = kinds[norm](HIDDEN, rngs=rngs)

        def features(self, x):
            return nnx.relu(self.normalise(self.first(x)))

        def __call__(self, x):
            return self.head(self.features(x))


if HAS["equinox"]:

    class EquinoxNet(eqx.Module):
        first: eqx.nn.Linear
        normalise: eqx.Module
        head: eqx.nn.Linear

        def __init__(self, norm, key, mode="ema"):
            keys = jax.random.split(key)
            self.first, self.head = (
                eqx.nn.Linear(INPUTS, HIDDEN, key=keys[0]),
                eqx.nn.Linear(HIDDEN, OUTPUTS, key=keys[1]),
            )
            if norm == "batch":
                self.normalise = eqx.nn.BatchNorm(HIDDEN, axis_name="batch", mode=mode)
            else:
                self.normalise = eqx.nn.GroupNorm(2, HIDDEN)

        def features(self, x, state=None):
            if state is None:
                return jax.nn.relu(self.normalise(self.first(x)))
            x, state = self.normalise(self.first(x), state)
            return jax.nn.relu(x), state

        def __call__(self, x, state=None):
            if state is None:
                return self.head(self.features(x))
            x, state = self.features(x, state)
            return self.head(x), state


NETWORKS = {
    "linen": lambda norm: imaml.linen_network(LinenNet(norm), (INPUTS,)),
    "nnx": lambda norm: imaml.nnx_network(lambda rngs: NnxNet(norm, rngs)),
    "equinox": lambda norm: imaml.equinox_network(lambda key: EquinoxNet(norm, key)),
}


def weights(library, parameters):
    """Return the kernels and biases of the two linear layers, with kernels [inputs, outputs]."""
    if library == "equinox":
        return [array for layer in (parameters.first, parameters.head) for array in (layer.weight.T, layer.bias)]
    return [parameters[layer][name] for layer in ("first", "head") for name in ("kernel", "bias")]


def by_hand(library, norm, parameters, x, reference):
    """Compute the features and outputs with NumPy. Batch normalisation takes the statistics of ``reference``."""
    kernel, bias, head, head_bias = (np.asarray(array, np.float64) for array in weights(library, parameters))
    hidden, other = x @ kernel + bias, reference @ kernel + bias
    if norm == "batch":
        normalised = (hidden - other.mean(0)) / np.sqrt(other.var(0) + EPSILON)
    else:
        groups = hidden.reshape(len(x), 2, -1)
        normalised = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + EPSILON)
    features = np.maximum(normalised.reshape(hidden.shape), 0)
    return features, features @ head + head_bias


@pytest.mark.slow("compiles networks of three libraries", fast="nnx-batch")
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_outputs_and_features_are_those_of_numpy(library, norm):
    network = NETWORKS[library](norm)
    parameters = jax.jit(network.init)(jax.random.key(1))
    random = np.random.default_rng(0)
    x, support = random.normal(size=(5, INPUTS)), 3 + 2 * random.normal(size=(7, INPUTS))
    features, outputs = by_hand(library, norm, parameters, x, x)
    np.testing.assert_allclose(jax.jit(network.apply)(parameters, jnp.float32(x)), outputs, atol=2e-5)
    np.testing.assert_allclose(jax.jit(network.features)(parameters, jnp.float32(x)), features, atol=2e-5)
    if norm == "group":
        assert network.apply_with_support_statistics is None and network.features_with_support_statistics is None
        return
    features, outputs = by_hand(library, norm, parameters, x, support)
    arguments = (parameters, jnp.float32(x), jnp.float32(support))
    np.testing.assert_allclose(jax.jit(network.apply_with_support_statistics)(*arguments), outputs, atol=2e-5)
    np.testing.assert_allclose(jax.jit(network.features_with_support_statistics)(*arguments), features, atol=2e-5)


@pytest.mark.slow("runs networks operation by operation")
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_parameters_are_those_that_the_library_draws_and_have_gradients(library):
    network, key = NETWORKS[library]("batch"), jax.random.key(3)
    parameters = network.init(key)
    x = jnp.ones((4, INPUTS)) * jnp.arange(4.0)[:, None]
    gradient = jax.grad(lambda p: (network.apply(p, x) ** 2).sum())(parameters)
    assert jax.tree.structure(gradient) == jax.tree.structure(parameters)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    expected = {
        "linen": lambda: LinenNet("batch").init(key, jnp.zeros((1, INPUTS)), True)["params"]["first"]["kernel"],
        "nnx": lambda: NnxNet("batch", nnx.Rngs(key)).first.kernel[...],
        "equinox": lambda: EquinoxNet("batch", key).first.weight.T,
    }[library]()
    np.testing.assert_array_equal(weights(library, parameters)[0], expected)


@pytest.mark.skipif(not HAS["flax"], reason="needs the extra flax")
def test_flax_modules_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match=r"a BatchNorm of LinenNet has momentum=0\.99"):
        imaml.linen_network(LinenNet("batch", momentum=0.99), (INPUTS,))

    class WithoutTrain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, momentum=0.0)(x)

    with pytest.raises(InputError, match="WithoutTrain has batch normalisation: give its __call__ an argument train"):
        imaml.linen_network(WithoutTrain(), (INPUTS,))

    class WithDropout(nnx.Module):
        def __init__(self, rngs):
            self.head, self.drop = nnx.Linear(INPUTS, OUTPUTS, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.head(x))

    with pytest.raises(InputError, match="WithDropout has state of the kind Rng"):
        imaml.nnx_network(lambda rngs: WithDropout(rngs))


@pytest.mark.skipif(not HAS["equinox"], reason="needs the extra equinox")
def test_an_equinox_module_whose_batchnorm_has_the_mode_batch_is_refused():
    with pytest.raises(InputError, match='a BatchNorm of EquinoxNet has mode="batch": pass mode="ema"'):
        imaml.equinox_network(lambda key: EquinoxNet("batch", key, mode="batch"))


# --- Runs ----------------------------------------------------------------------------------------------------------


if HAS["flax"]:

    class SmallCNN(nnx.Module):
        def __init__(self, filters, outputs, rngs):
            self.conv = nnx.Conv(1, filters, (3, 3), strides=7, rngs=rngs)
            self.norm = nnx.BatchNorm(filters, rngs=rngs)
            self.head = nnx.Linear(16 * filters, outputs, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1))


@dataclass(frozen=True)
class Small:
    filters: int = 2

    def build(self, outputs):
        return imaml.nnx_network(lambda rngs: SmallCNN(self.filters, outputs, rngs))


@pytest.mark.skipif(not HAS["flax"], reason="needs the extra flax")
@pytest.mark.slow("trains a run of a Flax module")
def test_a_run_with_a_module_is_restored_from_its_folder_and_the_preset(tmp_path, tiny_pixels):
    data = dataset(tiny_pixels)
    preset = imaml.replace(tiny_preset(2), name="small", network=Small(filters=3))
    run = imaml.train(preset, tmp_path, dataset=data, evaluation_tasks=4)
    assert run.evaluation.beside is not None
    with pytest.raises(InputError, match=r"type that imaml does not define \(network is .*Small\).*imaml\.load\(run"):
        imaml.load(tmp_path)
    with pytest.raises(InputError, match=r"fit the network|filters"):
        imaml.load(tmp_path, imaml.replace(preset, network=Small(filters=4)))
    learner = imaml.load(tmp_path, preset)
    jax.tree.map(np.testing.assert_array_equal, learner.theta, run.theta)
    images = tiny_pixels[:2, :3].reshape(-1, 28, 28, 1)
    adapted = learner.adapt(images, [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(adapted.probabilities(images)[:2], adapted.probabilities(images[:2]), atol=1e-6)
    imaml.register_preset(preset)
    assert imaml.evaluate(tmp_path, dataset=data, tasks=4) == run.evaluation


def test_replace_refuses_what_is_no_field_and_what_is_no_network():
    preset = tiny_preset(2)
    assert imaml.replace(preset, name="mine", seed=4) == tiny_preset(2).__class__(
        **{**{name: getattr(preset, name) for name in preset.__dataclass_fields__}, "name": "mine", "seed": 4}
    )
    with pytest.raises(InputError, match="there is no field of a preset 'netwrk': did you mean network"):
        imaml.replace(preset, netwrk=Small())

    @dataclass
    class Thawed:
        def build(self, outputs):
            return None

    for wrong in (Thawed(), Small, object(), lambda outputs: None):
        with pytest.raises(InputError, match="network should be a frozen dataclass"):
            imaml.replace(preset, network=wrong)


@pytest.mark.skipif(not HAS["flax"], reason="needs the extra flax")
def test_an_attribute_features_that_is_a_number_is_not_taken_for_the_last_hidden_layer():
    network = imaml.linen_network(nn.Dense(OUTPUTS), (INPUTS,))
    assert network.features is None
