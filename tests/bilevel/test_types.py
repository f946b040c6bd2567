"""Result records are pytrees, and every status has a message and a rank by severity."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl

SOLUTION = bl.Solution(jnp.ones(2), jnp.float32(0.5), jnp.int32(3), jnp.int32(bl.Status.BUDGET_USED))
INFO = bl.LinearInfo(jnp.ones(2), jnp.float32(0.1), jnp.int32(4), jnp.int32(bl.Status.MAX_STEPS))
RECORDS = [SOLUTION, INFO, bl.Hypergradient(jnp.float32(1.0), {"t": jnp.ones(3)}, None, SOLUTION, INFO)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_are_pytrees(record):
    leaves, structure = jax.tree.flatten(record)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert type(rebuilt) is type(record)
    # Field by field: from Python 3.13, == of two such records asks an array for its truth value, which is an error.
    for field in dataclasses.fields(record):
        new, old = getattr(rebuilt, field.name), getattr(record, field.name)
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, new, old))
    assert type(jax.jit(lambda r: r)(record)) is type(record)
    jax.tree.unflatten(structure, [None] * len(leaves))  # JAX itself unflattens with placeholders


def test_the_worst_status_is_the_most_severe():
    assert bl.Status.worst(bl.Status.CONVERGED, bl.Status.NONFINITE, bl.Status.MAX_STEPS) is bl.Status.NONFINITE
    assert [status.ok for status in bl.Status] == [True, True, True] + [False] * 8
    assert int(RECORDS[2].status) == bl.Status.MAX_STEPS


@pytest.mark.parametrize("status", bl.Status)
def test_every_status_has_a_message(status):
    assert status.message.endswith(".") and len(status.message) > 20


def test_a_method_without_a_linear_system_has_the_inner_status():
    assert int(bl.Hypergradient(1.0, 1.0, None, SOLUTION, None).status) == bl.Status.BUDGET_USED
