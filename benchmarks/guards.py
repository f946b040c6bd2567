"""Does a test miss each guard against a numerical fault? The guards are taken away one by one, in a copy.

    python -m benchmarks.guards [NAME …]

A guard is what keeps a wrong number from passing for a right one: a status, a recomputed residual, a wider sum. Each is
named by the fault it stands against, and the tests that must miss it by their place; a guard that none of them misses
makes the exit status 1.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.mutations import Mutation, copied, named, verdict

FAULTS = "tests/bilevel/test_faults.py"
LINEAR = "tests/bilevel/test_linear.py"
VERIFY = "tests/bilevel/test_verify.py"
HYPERGRADIENTS = "tests/bilevel/test_hypergradients.py"
META = "tests/imaml/learning/test_meta_gradient.py"
TRAINING = "tests/imaml/runs/test_training.py"


class Guard(NamedTuple):
    """What is taken away, and the test (or class of tests) that must fail without it."""

    mutation: Mutation
    test: str


def _guard(name: str, test: str, file: str, text: str, replacement: str) -> Guard:
    return Guard(Mutation(name, file, text, replacement), test)


GUARDS = (
    _guard(
        "inner solve short of its tol: status",
        f"{FAULTS}::TestShortOfTheTolerance::test_an_inner_solve_that_ends_early_is_told",
        "bilevel/solvers.py",
        "jnp.int32(Status.CONVERGED), jnp.int32(Status.MAX_STEPS))",
        "jnp.int32(Status.CONVERGED), jnp.int32(Status.CONVERGED))",
    ),
    _guard(
        "inner solve short of its tol: estimate",
        "tests/bilevel/test_certificates.py::test_too_few_inner_steps_are_covered",
        "bilevel/certificates/certificate.py",
        "error, remainder = distance(out.gradient, corrected)",
        "error, remainder = 0.5 * distance(out.gradient, corrected)",
    ),
    _guard(
        "linear solve short of its tol: status",
        f"{LINEAR}::test_a_budget_too_small_for_tol_is_told_with_the_true_residual",
        "bilevel/diagnosis.py",
        "return jnp.where(residual <= tol, jnp.int32(Status.CONVERGED), fallen_short)",
        "return jnp.int32(Status.CONVERGED)",
    ),
    _guard(
        "linear solve short of its tol: true residual",
        f"{LINEAR}::test_a_budget_too_small_for_tol_is_told_with_the_true_residual",
        "bilevel/diagnosis.py",
        "residual = relative_residual(b, found.left)",
        "residual = 0.5 * relative_residual(b, found.left)",
    ),
    _guard(
        "recursive residual that lies",
        f"{FAULTS}::TestShortOfTheTolerance::test_a_budget_that_ends_is_told_from_a_recursion_that_lies",
        "bilevel/diagnosis.py",
        "stopped=(turn == 1) & _equal(again.x, first.x)",
        "stopped=jnp.bool_(False)",
    ),
    _guard(
        "indefinite operator: curvature on the way",
        f"{FAULTS}::TestIndefinite",
        "bilevel/diagnosis.py",
        "jnp.where(curvature < -_rounding(length, size), mark, 0)",
        "jnp.where(jnp.bool_(False), mark, 0)",
    ),
    _guard(
        "indefinite operator: curvature of the solution",
        f"{FAULTS}::TestIndefinite",
        "bilevel/diagnosis.py",
        "jnp.where(first, (curvature <= _rounding(length, size)) & (length > 0), flat)",
        "jnp.where(first, jnp.bool_(False), flat)",
    ),
    _guard(
        "indefinite operator: a factorisation that breaks down",
        f"{LINEAR}::test_cholesky_fails_on_a_saddle_even_where_the_solution_does_not_show_it",
        "bilevel/linear.py",
        'return _factorise("solve_cholesky", self, matvec, b, Status.NEGATIVE_CURVATURE)',
        'return _factorise("solve_cholesky", self, matvec, b, Status.NONFINITE)',
    ),
    _guard(
        "indefinite operator: the λ that mends it",
        f"{FAULTS}::TestIndefinite::test_the_error_names_the_regularisation_that_mends_it",
        "bilevel/failures.py",
        "    if not smallest < 0:\n",
        "    if True:\n",
    ),
    _guard(
        "declared symmetric, is not: the probe",
        f"{FAULTS}::TestNotSymmetric::test_a_false_declaration_is_found_out",
        "bilevel/hypergradients.py",
        "    if condition.symmetric and not symmetric:\n",
        "    if False:\n",
    ),
    _guard(
        "declared symmetric, is not: the transpose all the same",
        f"{FAULTS}::TestNotSymmetric::test_the_layer_uses_the_transpose_all_the_same",
        "bilevel/hypergradients.py",
        "tangent, scaling, is_gradient(condition))",
        "tangent, scaling, condition.symmetric)",
    ),
    _guard(
        "singular operator: a null direction of conjugate gradients",
        f"{FAULTS}::TestSingular",
        "bilevel/diagnosis.py",
        "kind = jnp.where(null,",
        "kind = jnp.where(jnp.bool_(False),",
    ),
    _guard(
        "singular operator: a division by nothing",
        f"{FAULTS}::TestSingular",
        "bilevel/diagnosis.py",
        "        null = size == 0\n",
        "        null = jnp.bool_(False)\n",
    ),
    _guard(
        "singular operator: a factorisation's residual",
        f"{FAULTS}::TestSingular",
        "bilevel/linear.py",
        "info = diagnosis.report(b_unit, found, tree.eps(b) ** 0.5, flat.size, Status.SINGULAR, breakdown)",
        "info = diagnosis.report(b_unit, found, None, flat.size, Status.SINGULAR, Status.NONFINITE)",
    ),
    _guard(
        "NaN in the inner solve",
        f"{FAULTS}::TestNotFinite",
        "bilevel/solvers.py",
        "status = jnp.where(jnp.isfinite(residual_norm), status, jnp.int32(Status.NONFINITE))",
        "status = jnp.asarray(status)",
    ),
    _guard(
        "NaN in the linear solve",
        f"{FAULTS}::TestNotFinite::test_a_product_that_is_not_finite_is_the_linear_solve",
        "bilevel/diagnosis.py",
        "status = jnp.where(sound, status, jnp.int32(Status.NONFINITE))",
        "status = jnp.asarray(status)",
    ),
    _guard(
        "NaN in the outer value",
        f"{FAULTS}::TestNotFinite",
        "bilevel/failures.py",
        '("outer function", _nonfinite(out, out.value))',
        '("outer function", ok)',
    ),
    _guard(
        "NaN in the gradient",
        f"{FAULTS}::TestNotFinite",
        "bilevel/failures.py",
        '("gradient", _nonfinite(out, out.gradient))',
        '("gradient", ok)',
    ),
    _guard(
        "NaN: the first stage is named, not what it did to later ones",
        f"{FAULTS}::TestNotFinite",
        "bilevel/failures.py",
        "masked = masked | (status == Status.NONFINITE)",
        "masked = masked | False",
    ),
    _guard(
        "NaN: the task is named",
        f"{FAULTS}::TestBatches::test_policies",
        "bilevel/failures.py",
        "failed = np.flatnonzero(status > Status.BUDGET_USED)",
        "failed = np.arange(status.size)",
    ),
    _guard(
        "NaN: θ is not moved by minimize",
        f"{FAULTS}::TestNotFinite::test_theta_is_not_moved",
        "bilevel/outer.py",
        "sound = jnp.isfinite(size) & (out.status != Status.NONFINITE)",
        "sound = jnp.bool_(True)",
    ),
    _guard(
        "NaN: θ is not moved by a meta-step",
        f"{TRAINING}::test_training_that_diverges_is_refused_and_theta_is_not_updated",
        "imaml/runs/meta_step.py",
        "usable = report.tasks > 0",
        "usable = jnp.bool_(True)",
    ),
    _guard(
        "θ caught by a closure: differentiated",
        f"{HYPERGRADIENTS}::test_theta_caught_by_a_closure_is_differentiated",
        "bilevel/hypergradients.py",
        "lambda w: condition.residual(w, theta, data), jax.lax.stop_gradient(init), find",
        "lambda w: jax.lax.stop_gradient(condition.residual(w, theta, data)), jax.lax.stop_gradient(init), find",
    ),
    _guard(
        "θ caught by a closure: found by check_condition",
        f"{VERIFY}::test_a_captured_theta_is_found",
        "bilevel/verify/examine.py",
        "todo += cells + [entry for entry in arrays",
        "todo += [entry for entry in arrays",
    ),
    _guard(
        "θ nowhere but in the initial point",
        f"{VERIFY}::test_a_theta_that_is_only_in_the_initial_point_is_found",
        "bilevel/verify/examine.py",
        "    if not through.any():\n",
        "    if False:\n",
    ),
    _guard(
        "θ unused",
        f"{VERIFY}::test_an_unused_leaf_and_an_ignored_w_are_found",
        "bilevel/verify/examine.py",
        "    if unused:\n",
        "    if False:\n",
    ),
    _guard(
        "b = 0",
        f"{LINEAR}::test_zero_right_hand_side_and_multiples_of_the_identity_are_exact",
        "bilevel/linear.py",
        "jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))",
        "size",
    ),
    _guard(
        "A = cI: a recursion at its end",
        LINEAR,
        "bilevel/linear.py",
        "return max((0.9 if tol > 80 * eps else 0.5) * tol, eps**2)",
        "return (0.9 if tol > 80 * eps else 0.5) * tol",
    ),
    _guard(
        "one bad task in a batch: left out",
        f"{META}::test_a_task_of_nan_is_left_out_and_the_others_keep_every_bit",
        "imaml/learning/algorithms.py",
        "jnp.where(counts, new, 0)",
        "new",
    ),
    _guard(
        "one bad task in a batch: counted",
        f"{META}::test_a_task_of_nan_is_left_out_and_the_others_keep_every_bit",
        "imaml/learning/algorithms.py",
        "finite = out.status != bl.Status.NONFINITE",
        "finite = jnp.bool_(True)",
    ),
    _guard(
        "one bad task in a batch: an adjoint worse than none",
        f"{META}::test_an_adjoint_worse_than_none_is_left_out",
        "imaml/learning/algorithms.py",
        "usable = finite & (linear_residual <= 1)",
        "usable = finite",
    ),
    _guard(
        "dtypes: sums wider than their terms",
        f"{FAULTS}::TestDtypes",
        "bilevel/tree.py",
        "dtypes = [jnp.dtype(jnp.float32), *floats]",
        "dtypes = list(floats)",
    ),
    _guard(
        "dtypes: a factor takes the leaf's",
        f"{FAULTS}::TestDtypes",
        "bilevel/tree.py",
        "jnp.asarray(f, leaf.dtype) * leaf",
        "jnp.asarray(f, jnp.float32) * leaf.astype(jnp.float32)",
    ),
    _guard(
        "leaves: no derivative of a count",
        f"{FAULTS}::TestLeaves",
        "bilevel/tree.py",
        "d if is_floating(leaf) else jnp.zeros_like(leaf), like, cotangent",
        "d, like, cotangent",
    ),
    _guard(
        "leaves: complex θ refused",
        f"{FAULTS}::TestLeaves::test_complex_and_integer_variables_are_refused_with_the_reason",
        "bilevel/hypergradients.py",
        "if jnp.issubdtype(leaf.dtype, jnp.complexfloating):",
        "if False:",
    ),
    _guard(
        "leaves: inner variables that are no floats refused",
        f"{FAULTS}::TestLeaves::test_complex_and_integer_variables_are_refused_with_the_reason",
        "bilevel/hypergradients.py",
        "if not tree.is_floating(leaf):",
        "if False:",
    ),
    _guard(
        "kinks: a tie",
        f"{VERIFY}::test_a_tie_is_found_and_its_softplus_twin_is_not",
        "bilevel/verify/examine.py",
        'return Check("kinks", not at_the_point,',
        'return Check("kinks", True,',
    ),
    _guard(
        "kinks: a projection at its bound",
        f"{VERIFY}::test_a_projection_at_its_bound_is_a_kink",
        "bilevel/verify/examine.py",
        "            closest = rung\n",
        "            pass\n",
    ),
    _guard(
        "recompilation",
        f"{HYPERGRADIENTS}::test_one_trace_per_shape",
        "bilevel/hypergradients.py",
        '    @partial(jax.jit, static_argnames="init_function")\n',
        "",
    ),
    _guard(
        "recompilation of an outer step",
        "tests/bilevel/test_outer.py::test_one_trace_for_all_steps",
        "bilevel/outer.py",
        "    @jax.jit\n",
        "",
    ),
    _guard(
        "tiny and huge cotangents: solved as units",
        f"{LINEAR}::test_scales_with_the_right_hand_side",
        "bilevel/linear.py",
        "jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))",
        "jnp.ones_like(size)",
    ),
    _guard(
        "tiny and huge cotangents: a norm without squares that vanish",
        f"{LINEAR}::test_scales_with_the_right_hand_side",
        "bilevel/tree.py",
        "jnp.where((peak > 0) & jnp.isfinite(peak), peak, jnp.ones_like(peak))",
        "jnp.ones_like(peak)",
    ),
)


def main() -> int:
    chosen = {mutation.name for mutation in named([guard.mutation for guard in GUARDS], __doc__)}
    guards = [guard for guard in GUARDS if guard.mutation.name in chosen]
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder), "bilevel", "imaml", "tests", "pytest_bilevel.py", "pyproject.toml")
        planned = [(guard.mutation, [guard.test]) for guard in guards]
        return verdict(copy, planned, without=list(dict.fromkeys(guard.test for guard in guards)))


if __name__ == "__main__":
    sys.exit(main())
