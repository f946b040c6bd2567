"""The references of `bilevel.verify` agree with closed forms.

Each reference differentiates the quantity that its field ``question`` states: the solution, the solver's output, or the
formula at a given w.
"""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel.verify import oracles, references


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.slow("compiles each reference of each problem", fast="quadratic-dense")
@pytest.mark.parametrize("reference", references.REFERENCES.values(), ids=references.REFERENCES)
@pytest.mark.parametrize("name", ["affine root", "quadratic"])
def test_each_reference_is_the_closed_form_within_its_own_uncertainty(name, reference):
    case = problems.CASES[name]()
    found = reference(case.problem, problems.newton, case.theta, case.init, case.data)
    error = np.abs(found.derivatives - flat(case.gradient))
    assert (error <= found.uncertainty).all()
    # The error of extrapolated differences is a few eps·κ over the step, for κ up to 10 and steps of 1e-3 to 1e-2.
    assert (found.uncertainty < 1e-9).all()
    assert jax.tree.structure(found.gradient) == jax.tree.structure(case.theta)
    np.testing.assert_array_equal(flat(found.gradient), found.derivatives)


def test_each_reference_answers_its_own_question():
    """The solution w = θ has the derivative 1. After three steps, which halve the error, the derivative is 1 − ⅛."""
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w**2)
    arguments = problem, bl.GradientDescent(0.5, 3), 1.0, 0.0, None
    w = 7 / 8
    polished, plain = (references.finite_differences(*arguments, polish=polish) for polish in (None, False))
    tangents, formula = references.unrolled(*arguments), references.dense(*arguments, w=w)
    assert polished.question == references.dense(*arguments).question == "the solution"
    assert plain.question == tangents.question == "the solver's output"
    assert formula.question == "the formula at this w"
    for found, exact in ((polished, 2), (plain, 2 * w * w), (tangents, 2 * w * w), (formula, 2 * w)):
        assert abs(found.gradient - exact) <= found.uncertainty[0] < 1e-9


@pytest.mark.slow("compiles each reference for float32 arguments")
def test_float32_arguments_give_float64_references():
    """θ, data, the start and a captured constant are float32. Integers stay integers."""
    with jax.enable_x64(False):
        constant = jnp.float32(0.1)
        theta, data = {"count": jnp.int32(3), "x": jnp.float32([0.5, 2.0])}, (jnp.float32(3.0), jnp.int32(2))
        start = jnp.zeros(2)

    def residual(w, theta, data):
        return w - constant * theta["x"] ** data[1] * theta["count"]

    problem = bl.Problem(bl.Root(residual), lambda w, theta, data: jnp.sum(w) * data[0])
    exact = 3 * 0.1 * 2 * np.array([0.5, 2.0]) * 3
    for reference in references.REFERENCES.values():
        found = reference(problem, problems.newton, theta, start, data)
        assert found.labels == ("theta['x'][0]", "theta['x'][1]")
        np.testing.assert_allclose(found.gradient["x"], exact, rtol=1e-7)  # the captured 0.1 is a float32
        assert found.gradient["x"].dtype == np.float64 and found.gradient["count"] == 0


@pytest.mark.slow("differentiates along many directions")
def test_a_large_theta_is_differentiated_along_random_directions():
    entries = 200
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * (w - jnp.mean(theta**2)) ** 2), lambda w, theta, data: jnp.sin(w)
    )
    theta = jnp.linspace(0.5, 1.5, entries)
    exact = jnp.cos(jnp.mean(theta**2)) * 2 * theta / entries
    for reference in references.REFERENCES.values():
        found = reference(problem, problems.newton, theta, jnp.zeros(()), None)
        assert found.gradient is None and found.directions.shape == (references.RANDOM_DIRECTIONS, entries)
        error = np.abs(found.derivatives - found.directions @ np.asarray(exact))
        assert (error <= found.uncertainty).all() and (found.uncertainty < 1e-9).all()


def test_a_kink_widens_the_uncertainty_of_finite_differences():
    """For |θ| at 0 central differences are 0, but subgradients lie between −1 and 1. For θ² nothing is uncertain."""
    condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
    for outer, spread in ((lambda w, theta, data: jnp.abs(w), 1.0), (lambda w, theta, data: w**2, 0.0)):
        found = references.finite_differences(bl.Problem(condition, outer), problems.newton, 0.0, 0.0, None)
        assert abs(found.derivatives[0]) < 1e-10
        assert found.uncertainty[0] == pytest.approx(spread, abs=1e-10)


def test_the_solver_is_differenced_where_newtons_method_fails():
    """Every w with w₀ + w₁ = θ is a minimum: the Hessian is singular. Descent finds the one nearest to its start."""
    condition = bl.Stationary(lambda w, theta, data: 0.5 * (jnp.sum(w) - theta) ** 2)
    problem = bl.Problem(condition, lambda w, theta, data: w[0] ** 2)
    arguments = problem, bl.GradientDescent(0.5, 1), 1.0, jnp.zeros(2), None
    found = references.finite_differences(*arguments)
    assert found.question == "the solver's output"
    assert found.gradient == pytest.approx(0.5, abs=found.uncertainty[0])  # w₀ = θ / 2
    assert np.isinf(references.dense(*arguments).uncertainty).all()
    with pytest.raises(references.ReferenceUnavailable, match="Newton"):
        references.finite_differences(*arguments, polish=True)


def test_impossible_arguments_are_refused_with_a_reason():
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2)), lambda w, theta, data: 0.0)
    with pytest.raises(TypeError, match=r"'a'.*complex"):
        references.dense(problem, None, {"a": jnp.ones((), complex)}, None, None, w=0.0)
    with pytest.raises(references.ReferenceUnavailable, match="1001"):
        references.dense(problem, None, 1.0, None, None, w=jnp.zeros(1001))
    with pytest.raises(ValueError, match=r"\[m, 1\]"):
        references.dense(problem, None, 1.0, None, None, w=0.0, directions=np.ones(1))


@pytest.mark.parametrize("old", ["finite_differences", "unrolled", "dense", "Reference", "OracleError"])
def test_the_old_module_is_deprecated(old):
    new = {"OracleError": "ReferenceUnavailable"}.get(old, old)
    with pytest.warns(DeprecationWarning, match=rf"oracles.{old} is deprecated.* use bilevel.verify.references.{new}$"):
        assert getattr(oracles, old) is getattr(references, new)
    with pytest.raises(AttributeError, match="has no attribute 'sense'"):
        oracles.sense  # noqa: B018
