"""A training run of a few tiny tasks, and functions that start, stop, read and compare such runs."""

import contextlib
import functools
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_preset import dataset, tiny_preset

import imaml
from imaml import datasets
from imaml.runs import checkpoints, evaluation, step_compiler
from imaml.runs import log as runlog
from imaml.runs.meta_step import initial_state
from imaml.storage import files

STEPS, STOP_AT, EVALUATION_TASKS = 6, 3, 4
DEFAULTS = {"evaluation_tasks": EVALUATION_TASKS, "checkpoint_seconds": float("inf")}
"""With ``checkpoint_seconds`` infinite, a run saves only when it ends or is stopped, however slow the machine is."""


PRESET = tiny_preset(STEPS)


# --- Traced functions ----------------------------------------------------------------------------------------------


def counted_meta_step(traced):
    """Return a replacement of ``step_compiler.meta_step`` that counts traces.

    The replacement returns the same function for the same preset and mesh, so that JAX can reuse a trace. That function
    appends its preset to ``traced`` whenever JAX traces it.
    """
    original = step_compiler.meta_step

    @functools.cache
    def meta_step(preset, mesh=None):
        step = original(preset, mesh)

        def meta_step_of_test(*inputs):
            traced.append(preset)
            return step(*inputs)

        return meta_step_of_test

    return meta_step


shared_traces = []
shared_meta_step = counted_meta_step(shared_traces)
_task_scores, _over_tasks = functools.cache(evaluation.task_scores), functools.cache(evaluation.over_tasks)


@contextlib.contextmanager
def patched(pixels, meta_step):
    """Use :func:`programs`, and let every dataset name give the tiny dataset, within the ``with`` block."""
    tiny = dataset(pixels)
    with programs(meta_step), pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: tiny)
        yield


@contextlib.contextmanager
def programs(meta_step):
    """Replace the functions that training and evaluation trace, within the ``with`` block.

    Training uses ``meta_step``. For equal arguments, ``task_scores`` and ``over_tasks`` return the same function again,
    so that JAX does not trace it anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_compiler, "meta_step", meta_step)
        patch.setattr(evaluation, "task_scores", _task_scores)
        patch.setattr(evaluation, "over_tasks", _over_tasks)
        yield


# --- Runs ----------------------------------------------------------------------------------------------------------


def train(directory, preset=PRESET, **options):
    """Train ``preset`` with :data:`DEFAULTS`, unless ``options`` say otherwise."""
    return imaml.train(preset, directory, **(DEFAULTS | options))


def stop_at(step, number=signal.SIGTERM):
    """Return a function for ``on_progress`` that sends this process a signal after the given meta-step."""
    return lambda progress: signal.raise_signal(number) if progress.step == step else None


def stop_halfway(directory):
    """Train the tiny preset in ``directory`` and stop it by a signal after meta-step ``STOP_AT``."""
    train(directory, on_progress=stop_at(STOP_AT))
    assert checkpoints.newest(directory).step == STOP_AT


def saved_state(directory):
    """Return the state in the newest checkpoint of a run of the tiny preset."""
    return checkpoints.newest(directory).restore(initial_state(PRESET))


def contents(directory):
    """Return the contents of every file in a folder by name. The lock is left out: it differs between processes."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != files.LOCK}


def _numbers(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_equal_states(one, other):
    """Assert that two states have equal leaves. NaN equals NaN, and −0 equals 0."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_numbers(a), _numbers(b)), one, other)


def assert_same_run(directory, expected):
    """Assert that a run ended like the expected one.

    Args:
        directory: folder of the run.
        expected: record whose ``run`` is the result of the expected run. The states in the newest checkpoints must be
            equal. The logs must be equal except for the seconds.
    """
    assert_equal_states(saved_state(directory), saved_state(expected.run.directory))
    logs = [[replace(p, seconds=0.0) for p in runlog.read_log(d)] for d in (directory, expected.run.directory)]
    assert logs[0] == logs[1]
