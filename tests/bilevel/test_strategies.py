"""The closed forms of `bilevel.testing` agree with difference quotients and with a dense solve."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given

from bilevel import testing
from bilevel.testing import families, strategies
from bilevel.testing.cases import LAYOUTS, arrange, flatten
from bilevel.verify import precision, references

pytestmark = pytest.mark.usefixtures("quick_compilation")
few = functools.partial(hypothesis.settings, deadline=None, derandomize=True, database=None)
VARIANTS = {
    **{name: (family, {}) for name, family in families.FAMILIES.items()},
    "imaml, one λ per entry": (families.imaml, {"strength": "each"}),
    "kkt, inequalities": (families.kkt, {"inequality": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
@few(max_examples=10)
@given(
    seed=hypothesis.strategies.integers(0, 2**32 - 1), condition=hypothesis.strategies.sampled_from([2.0, 10.0, 100.0])
)
def test_the_gradient_is_the_difference_quotient_of_the_closed_form(name, seed, condition):
    family, options = VARIANTS[name]
    case = family(seed=seed, condition=condition, **options)
    theta, step = flatten(case.theta, np), 1e-4

    def slope(row, step):
        ahead, behind = (case._value(theta + sign * step * row) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    # Richardson's extrapolation has the error O(step⁴) times a fifth derivative of at most the order of κ⁵. The
    # quotient divides the rounding error of the closed form, eps·κ·|value|, by the step.
    rows = np.eye(theta.size)
    found = np.array([(4 * slope(row, step / 2) - slope(row, step)) / 3 for row in rows])
    expected = flatten(case.gradient, np)
    rounding = 10 * np.finfo(float).eps * case.condition_number * (1 + abs(case.value)) / step
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max() + rounding)


@pytest.mark.slow("compiles a dense solve for each family", fast=("quadratic", "root", "fixed_point", "imaml", "kkt"))
@pytest.mark.parametrize("name", VARIANTS)
def test_the_closed_form_solves_the_condition_and_agrees_with_a_dense_solve(name):
    family, options = VARIANTS[name]
    case = family(w="dict", theta="dict", seed=3, **options)
    reference = references.dense(case.problem, None, case.theta, None, case.data, w=case.w)
    size = 1 + np.abs(flatten(case.w, np)).max()
    assert reference.residual_norm <= 100 * np.finfo(float).eps * case.condition_number * size
    found, expected = flatten(reference.gradient, np), flatten(case.gradient, np)
    np.testing.assert_allclose(found, expected, rtol=0, atol=case.rtol * np.abs(expected).max())


@pytest.mark.slow(
    "compiles a hypergradient for each family",
    fast=(
        "imaml",
        "box",
    ),
)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_suggested_solver_and_method_find_the_answer(name):
    family, options = VARIANTS[name]
    testing.assert_case(family(w="tuple", theta="tuple", seed=5, **options))


@pytest.mark.parametrize("family", [families.fixed_point, families.root])
def test_the_matrices_of_general_families_are_not_symmetric(family):
    for seed in range(10):
        matrix = family(seed=seed).data["matrix"]
        assert np.linalg.norm(matrix - matrix.T) > 0.1 * np.linalg.norm(matrix)


@pytest.mark.slow("compiles differences for each family", fast="box")
@pytest.mark.parametrize("family", [families.box, families.simplex, families.lasso])
def test_the_active_set_is_constant_within_the_margin(family):
    """Points within the margin of w − η∇objective have one active set, so the projection or prox is affine there."""
    for seed in range(20):
        case = family(seed=seed)
        assert case.margin > 0.01
        with precision.double_precision():
            condition = case.problem.condition
            at = case.w - condition.step_size * jax.grad(condition.objective)(case.w, case.theta, case.data)
            project = getattr(condition, "projection", None) or functools.partial(condition.prox, step_size=1.0)
            moves = 0.9 * case.margin * np.random.default_rng(seed).uniform(-1, 1, (5, at.size)) / at.size
            here = np.asarray(project(at, case.theta, case.data))
            for move in moves:
                ahead, behind = (np.asarray(project(at + s * move, case.theta, case.data)) for s in (1, -1))
                np.testing.assert_allclose(ahead - here, here - behind, atol=1e-14)


@few(max_examples=30)
@given(case=strategies.problems())
def test_a_case_is_printed_as_the_call_that_makes_it(case):
    again = eval(repr(case), vars(families).copy())
    assert repr(again) == repr(case)
    assert again.problem is case.problem  # the same object, for which a program may be compiled already
    for one, other in zip(jax.tree.leaves(case.data), jax.tree.leaves(again.data), strict=True):
        np.testing.assert_array_equal(one, other)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((case.theta, case.init, case.data))}
    assert dtypes == {case.dtype}


@pytest.mark.slow("compiles for each drawn problem")
@few(max_examples=4)
@given(case=strategies.ridge_problems(sizes=(3,), w_layouts=("dict",), theta_layouts=("scalar",)))
def test_a_strategy_draws_both_dtypes_and_the_default_method_meets_its_tolerance(case):
    testing.assert_case(case)


def test_float64_is_drawn_only_where_jax_has_it():
    with jax.enable_x64(False):
        hypothesis.find(strategies.ridge_problems(), lambda case: case.dtype == np.float32, settings=few())
        with pytest.raises(hypothesis.errors.NoSuchExample):
            hypothesis.find(
                strategies.ridge_problems(), lambda case: case.dtype == np.float64, settings=few(max_examples=20)
            )


@pytest.mark.parametrize("layout", [*LAYOUTS, "scalar"])
def test_a_layout_keeps_the_order_of_entries(layout):
    vector = np.arange(1.0 if layout == "scalar" else 4.0)
    np.testing.assert_array_equal(flatten(arrange(vector, layout), np), vector)


@pytest.mark.parametrize(
    "options", [{"size": 2}, {"condition": 0.5}, {"dtype": "float16"}, {"w": "scalar"}, {"theta": "x"}]
)
def test_invalid_options_are_refused(options):
    with pytest.raises(ValueError, match="got Options"):
        families.quadratic(**options)


def test_a_strategy_refuses_an_argument_its_family_does_not_take():
    with pytest.raises(TypeError, match="ridge_problems has no option inequality"):
        strategies.ridge_problems(inequality=(True,))
