"""Modules of Flax and Equinox as networks: pure functions of their parameters.

Neither library is required by this package. Each function imports its library when it is called.

In few-shot learning, batch normalisation takes mean and variance from the batch at hand and keeps no running averages.
``Network.apply`` therefore runs a module in training mode and drops the new averages. For the support set's statistics,
the module runs on the support set in training mode, and then on the query set with the averages of that one call.

If a module has a method ``features``, the result of the method is taken as the last hidden layer, which
:func:`imaml.diagnose` uses.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from imaml.errors import InputError
from imaml.learning.networks import Network

AXIS = "batch"
"""The name of the axis of examples in an Equinox module with batch normalisation."""


def linen_network(module: Any, input_shape: tuple[int, ...]) -> Network:
    """Return the network of a Flax linen module.

    Args:
        module: a ``flax.linen.Module`` from inputs ``[batch, *input_shape]`` to outputs ``[batch, outputs]``. With
            batch normalisation, ``__call__`` must have an argument ``train``, and each ``BatchNorm`` must have
            ``use_running_average=not train`` and ``momentum=0.0``.
        input_shape: the shape of one input, such as ``(28, 28, 1)``.

    Raises:
        InputError: if the module has variables other than parameters and averages, if it has averages and no argument
            ``train``, or if the momentum of a batch normalisation is not 0.
        ImportError: if Flax is missing.
    """
    import flax.linen as nn

    def call(variables, x, train, method="__call__", **options):
        takes_train = "train" in inspect.signature(getattr(type(module), method)).parameters
        return module.apply(variables, x, method=method, **({"train": train} if takes_train else {}), **options)

    def variables_of(key):
        takes_train = "train" in inspect.signature(type(module).__call__).parameters
        return module.init(key, jnp.zeros((1, *input_shape)), **({"train": True} if takes_train else {}))

    def check_momentum(call_next, arguments, keywords, context):
        if isinstance(context.module, nn.BatchNorm) and context.module.momentum != 0:
            raise InputError(
                f"a BatchNorm of {type(module).__name__} has momentum={context.module.momentum}, so its averages are "
                "not the statistics of one batch: pass momentum=0.0"
            )
        return call_next(*arguments, **keywords)

    with nn.intercept_methods(check_momentum):
        shapes = jax.eval_shape(variables_of, jax.random.key(0))
    averages = {name: shapes[name] for name in shapes if name != "params"}
    _check_states(module, set(averages), {"batch_stats"})
    if averages and "train" not in inspect.signature(type(module).__call__).parameters:
        raise InputError(f"{type(module).__name__} has batch normalisation: give its __call__ an argument train")
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), averages)

    def in_training(parameters, x, method="__call__"):
        if not averages:
            return call({"params": parameters}, x, True, method), empty
        return call({"params": parameters, **empty}, x, True, method, mutable=list(averages))

    def with_averages(parameters, x, found, method="__call__"):
        return call({"params": parameters, **found}, x, False, method)

    return _network(lambda key: variables_of(key)["params"], in_training, with_averages, bool(averages), module)


def nnx_network(make: Callable[[Any], Any]) -> Network:
    """Return the network of a Flax nnx module.

    Args:
        make: a function from ``flax.nnx.Rngs`` to a ``flax.nnx.Module`` from inputs ``[batch, …]`` to outputs ``[batch,
            outputs]``. The momentum of its batch normalisations is replaced by 0.

    Raises:
        InputError: if the module has state other than parameters and averages, such as the random stream of a dropout.
        ImportError: if Flax is missing.
    """
    from flax import nnx

    def made(key):
        model = make(nnx.Rngs(key))
        for _, part in nnx.iter_modules(model):
            if isinstance(part, nnx.BatchNorm):
                part.momentum = 0.0
        return model

    model = nnx.eval_shape(lambda: made(jax.random.key(0)))
    graph, parameters_like, averages_like, others = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    _check_states(model, {type(leaf).__name__ for _, leaf in nnx.to_flat_state(others)}, set())
    has_averages = bool(nnx.to_flat_state(averages_like))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), averages_like)

    def run(parameters, averages, x, training, method):
        # Copy the variables: the module changes them, and Flax refuses to change variables of an outer trace.
        state, averages = (jax.tree.map(lambda leaf: leaf, tree) for tree in (parameters_like, averages))
        nnx.replace_by_pure_dict(state, parameters)
        model = nnx.merge(graph, state, averages)
        (model.train if training else model.eval)()
        outputs = model(x) if method == "__call__" else getattr(model, method)(x)
        return outputs, nnx.state(model, nnx.BatchStat)

    def in_training(parameters, x, method="__call__"):
        return run(parameters, empty, x, True, method)

    def with_averages(parameters, x, found, method="__call__"):
        return run(parameters, found, x, False, method)[0]

    def init(key):
        return nnx.to_pure_dict(nnx.state(made(key), nnx.Param))

    return _network(init, in_training, with_averages, has_averages, model)


def equinox_network(make: Callable[[jax.Array], Any]) -> Network:
    """Return the network of an Equinox module.

    Args:
        make: a function from a random key to an ``equinox.Module``. The module maps one input, without an axis of
            examples, to ``[outputs]``. With batch normalisation, each ``BatchNorm`` must have ``axis_name="batch"`` and
            ``mode="ema"``, and the module takes and returns a state: ``module(x, state) -> (outputs, state)``. The
            network runs the module in training mode with a new state, so the averages are the statistics of one batch.

    Raises:
        InputError: if a ``BatchNorm`` has another mode. Its averages would not be the statistics of one batch.
        ImportError: if Equinox is missing.
    """
    import equinox as eqx

    def is_norm(part):
        return isinstance(part, eqx.nn.BatchNorm)

    def made(key):
        model, state = eqx.nn.make_with_state(make)(key)
        for part in jax.tree.leaves(model, is_leaf=is_norm):
            if is_norm(part) and part.mode != "ema":
                raise InputError(f'a BatchNorm of {type(model).__name__} has mode="{part.mode}": pass mode="ema"')
        parameters, rest = eqx.partition(model, eqx.is_inexact_array)
        return parameters, rest, state

    _, rest, like = eqx.filter_eval_shape(made, jax.random.key(0))
    has_averages = bool(jax.tree.leaves(like))

    def run(model, state, x, method):
        function = model if method == "__call__" else getattr(model, method)
        if not has_averages:
            return jax.vmap(function)(x), state
        return jax.vmap(function, axis_name=AXIS, in_axes=(0, None), out_axes=(0, None))(x, state)

    def in_training(parameters, x, method="__call__"):
        state = made(jax.random.key(0))[2] if has_averages else None
        return run(eqx.combine(parameters, rest), state, x, method)

    def with_averages(parameters, x, found, method="__call__"):
        return run(eqx.nn.inference_mode(eqx.combine(parameters, rest)), found, x, method)[0]

    return _network(lambda key: made(key)[0], in_training, with_averages, has_averages, rest)


def _network(init, in_training, with_averages, has_averages, module):
    """Return a network from functions that run a module.

    ``in_training(parameters, x, method)`` returns outputs and averages, and ``with_averages(parameters, x, averages,
    method)`` returns outputs.
    """

    def by(method):
        def apply(parameters, x):
            return in_training(parameters, x, method)[0]

        def with_support(parameters, x, support_x):
            return with_averages(parameters, x, in_training(parameters, support_x, method)[1], method)

        return apply, with_support if has_averages else None

    apply, with_support = by("__call__")
    features, features_with_support = by("features") if callable(getattr(module, "features", None)) else (None, None)
    return Network(init, apply, with_support, features, features_with_support)


def _check_states(module, found, known):
    if other := sorted(found - known):
        raise InputError(
            f"{type(module).__name__} has state of the kind {', '.join(other)}, which a network of few-shot learning "
            "cannot have: only parameters and the averages of batch normalisation"
        )
