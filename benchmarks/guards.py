"""Remove each guard against numerical faults from a copy of the library, and check that the guard's test then fails.

    python -m benchmarks.guards [NAME …]

A guard is code that prevents or reports a wrong number: a status, a recomputed residual, a sum in a wider dtype. Each
guard has a test that must fail without it. The exit status is 1 if a test passes although its guard was removed, or if
a test fails on the unchanged copy. `planting.py` says how a guard's removal is written.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.fault_runs import chosen, copy_into, run
from benchmarks.planting import Fault, Sources


class Guard(NamedTuple):
    """A guard's removal, and the test that must fail after it.

    Attributes:
        fault: the removal.
        test: the qualified name of a test function or of a class of tests, written like the place of a fault.
    """

    fault: Fault
    test: str


def _guard(name: str, test: str, place: str, pattern: str, replacement: str) -> Guard:
    return Guard(Fault(name, place, pattern, replacement), test)


GUARDS = (
    # Solves that miss their tolerance.
    _guard(
        "inner solve short of its tol: status",
        "TestShortOfTheTolerance.test_an_inner_solve_that_ends_early_is_max_steps",
        "solvers:report",
        "Status.MAX_STEPS",
        "Status.CONVERGED",
    ),
    _guard(
        "inner solve short of its tol: estimate",
        "test_the_bound_covers_the_error_of_too_few_inner_steps",
        "_certify",
        "tree.distance(out.gradient, corrected)",
        "0.5 * tree.distance(out.gradient, corrected)",
    ),
    _guard(
        "linear solve short of its tol: status",
        "test_a_budget_too_small_for_tol_is_max_steps_with_the_true_residual",
        "diagnosis:judge",
        "jnp.where(residual <= tol, _CONVERGED, _SHORT)",
        "_CONVERGED",
    ),
    _guard(
        "linear solve short of its tol: true residual",
        "test_a_budget_too_small_for_tol_is_max_steps_with_the_true_residual",
        "relative_residual",
        "tree.norm(_RESIDUAL) / _SIZE",
        "0.5 * tree.norm(_RESIDUAL) / _SIZE",
    ),
    _guard(
        "linear solve short of its tol: stagnation is not a spent budget",
        "TestShortOfTheTolerance.test_an_exhausted_budget_is_max_steps_and_a_recursion_that_stops_is_stagnation",
        "report_recursion",
        "jnp.int32(Status.STAGNATION)",
        "jnp.int32(Status.MAX_STEPS)",
    ),
    # Answers that are no better than zero.
    _guard(
        "no tol: a residual of 1 or more",
        "test_a_budget_too_small_for_tol_is_max_steps_with_the_true_residual",
        "diagnosis:judge",
        "residual < jnp.maximum(start, 1)",
        "jnp.bool_(True)",
    ),
    _guard(
        "no tol: a start that is worse than zero",
        "TestNoBetterThanZero.test_a_start_that_is_worse_than_zero_is_a_spent_budget_if_the_solve_improves_it",
        "diagnosis:judge",
        "jnp.maximum(start, 1)",
        "1",
    ),
    _guard(
        "no tol: an answer that outgrew its residual",
        "TestNoBetterThanZero.test_an_answer_that_outgrew_its_residual_is_a_breakdown",
        "outgrown",
        "_STRETCHED & _LARGE",
        "jnp.zeros_like(_STRETCHED)",
    ),
    _guard(
        "a series that diverges",
        "TestNoBetterThanZero.test_a_series_that_diverges_is_a_breakdown",
        "Neumann",
        "jnp.where(diverged, _BREAKDOWN, _STATUS)",
        "_STATUS",
    ),
    _guard(
        "an answer that overflows",
        "TestNoBetterThanZero.test_an_answer_that_overflows_is_nonfinite",
        "denormalise",
        "jnp.where(overflow, _NONFINITE, _STATUS)",
        "_STATUS",
    ),
    _guard(
        "the limit of rounding: a null space",
        "TestSingularAndConsistent",
        "limit_of_rounding",
        "eps * _SUM",
        "0.0 * _SUM",
    ),
    _guard(
        "a curvature of rounding size in Newton's method",
        "test_newton_steps_do_not_diverge_along_a_null_direction",
        "bilevel.linear.watched_cg:conjugate_gradients",
        "curvature > 4 * eps * stretch * length**2",
        "curvature > 0",
    ),
    _guard(
        "ill-conditioned and regular: the backward error",
        "test_a_factorisation_is_judged_by_its_backward_error_and_reports_the_conditioning",
        "backward_error",
        "tree.norm(x) / _SIZE",
        "0 * tree.norm(x) / _SIZE",
    ),
    _guard(
        "breakdown of BiCGStab: status",
        "test_bicgstab_breaks_down_on_a_quarter_turn_and_other_solvers_do_not",
        "report_recursion",
        "jnp.where(seen.broke, _BREAKDOWN, _CAUSE)",
        "_CAUSE",
    ),
    _guard(
        "a solver that stopped by itself",
        "TestStoppedByItself",
        "solvers:report",
        "jnp.where(stopped, _STOPPED, _FAILURE)",
        "_FAILURE",
    ),
    _guard(
        "an operator that is not square",
        "test_an_operator_that_is_not_square_is_refused",
        "square",
        "tree.shapes(product) != tree.shapes(b)",
        "False",
    ),
    # Operators that are not positive definite.
    _guard(
        "indefinite operator: curvature met on the way",
        "TestIndefinite",
        "bilevel.linear.watched_cg:conjugate_gradients",
        "reported_curvature < -_ROUNDING",
        "jnp.bool_(False)",
    ),
    _guard(
        "indefinite operator: curvature of the solution",
        "TestIndefinite",
        "bilevel.linear.diagnosis:diagnose",
        "_CURVATURE <= rounding",
        "jnp.bool_(False)",
    ),
    _guard(
        "indefinite operator: a factorisation that breaks down",
        "test_cholesky_reports_a_saddle_that_its_solution_does_not_show",
        "Cholesky",
        "Status.NEGATIVE_CURVATURE",
        "Status.NONFINITE",
    ),
    _guard(
        "indefinite operator: the error names the λ that suffices",
        "TestIndefinite.test_the_error_names_the_regularisation_that_suffices",
        "_remedies_of_a_linear_solve",
        "smallest < 0 and _HELPS",
        "False",
    ),
    # Operators that are declared symmetric but are not symmetric.
    _guard(
        "false declaration of symmetry: the probe",
        "TestNotSymmetric.test_a_false_declaration_is_reported",
        "Implicit.__call__",
        "condition.symmetric and _DOUBTED",
        "False",
    ),
    _guard(
        "true declaration of symmetry: products that cancel",
        "test_products_that_cancel_are_not_taken_for_an_asymmetry",
        "probe_symmetry",
        "jnp.maximum(_ROUNDING, 10 * noise)",
        "_ROUNDING",
    ),
    _guard(
        "false declaration of symmetry: the layer multiplies by the transpose",
        "TestNotSymmetric.test_the_layer_uses_the_transpose_whatever_is_declared",
        "solve_implicitly",
        "is_gradient(_CONDITION)",
        "_CONDITION.symmetric",
    ),
    # Singular operators.
    _guard(
        "singular operator: a null direction of conjugate gradients",
        "TestSingular",
        "bilevel.linear.watched_cg:conjugate_gradients",
        "meaningful & zero_curvature & _SHORT",
        "jnp.bool_(False)",
    ),
    _guard(
        "singular operator: not reported as indefinite",
        "TestSingular",
        "report_recursion",
        "jnp.where(seen.null, _SINGULAR, _CAUSE)",
        "_CAUSE",
    ),
    _guard(
        "singular operator: the condition estimate of a factorisation",
        "TestSingular",
        "report_direct",
        "jnp.where((rcond < eps) & _FINITE, _SINGULAR, _STATUS)",
        "_STATUS",
    ),
    # Numbers that are not finite.
    _guard(
        "NaN in the inner solve",
        "TestNotFinite",
        "solvers:report",
        "jnp.where(jnp.isfinite(...), _STATUS, _NONFINITE)",
        "jnp.asarray(_STATUS)",
    ),
    _guard(
        "NaN in the linear solve",
        "TestNotFinite.test_a_product_that_is_not_finite_is_reported_by_the_linear_solve",
        "bilevel.linear.diagnosis:diagnose",
        "jnp.where(jnp.isfinite(residual), _STATUS, _NONFINITE)",
        "_STATUS",
    ),
    _guard("NaN in the outer value", "TestNotFinite", "_stages", "_nonfinite(out, out.value)", "ok"),
    _guard("NaN in the gradient", "TestNotFinite", "_stages", "_nonfinite(out, out.gradient)", "ok"),
    _guard("NaN: later stages are not named", "TestNotFinite", "_stages", "_EARLIER | _NOW", "_EARLIER"),
    _guard(
        "NaN: the task is named",
        "TestBatches.test_each_policy_names_the_failed_tasks",
        "_sentence",
        "np.flatnonzero(...)",
        "np.arange(status.size)",
    ),
    _guard(
        "NaN: θ is not moved by minimize",
        "TestNotFinite.test_minimize_does_not_move_theta",
        "outer_step",
        "jnp.isfinite(_SIZE) & _SOUND & _GOING",
        "_GOING",
    ),
    _guard(
        "NaN: θ is not moved by a meta-step",
        "test_training_that_diverges_is_refused_and_theta_is_not_updated",
        "meta_step",
        "_REPORT.tasks > 0",
        "jnp.bool_(True)",
    ),
    # θ that is captured by a closure, enters only the initial point, or is unused.
    _guard(
        "θ captured by a closure: differentiated",
        "test_theta_captured_by_a_closure_is_differentiated",
        "solve_implicitly",
        "adjoint_residual(condition)(_W, _THETA, _DATA)",
        "jax.lax.stop_gradient(adjoint_residual(condition)(_W, _THETA, _DATA))",
    ),
    _guard(
        "θ captured by a closure: found by check_condition",
        "test_a_captured_theta_is_found",
        "_reachable_values",
        "cells + _GLOBALS",
        "_GLOBALS",
    ),
    _guard(
        "θ only in the initial point",
        "test_a_theta_that_enters_only_the_initial_point_is_found",
        "_check_theta_is_used",
        "not _THROUGH.any()",
        "False",
    ),
    _guard("θ unused", "test_an_unused_leaf_and_an_ignored_w_are_found", "_check_theta_is_used", "sorted(...)", "[]"),
    # Systems that need no iteration, or fewer than the budget.
    _guard(
        "a right-hand side of zero",
        "test_a_zero_right_hand_side_and_a_multiple_of_the_identity_are_exact",
        "normalise",
        "jnp.where(_SOUND, _SIZE, jnp.ones_like(_SIZE))",
        "_SIZE",
    ),
    _guard(
        "an easy system: the recursion stops at rounding size",
        "test_a_large_budget_on_an_easy_system_keeps_the_solution",
        "_solve_with_jaxopt",
        "max(_TOL, 4 * tree.eps(b))",
        "_TOL",
    ),
    # One bad task in a batch.
    _guard(
        "one bad task in a batch: left out",
        "test_a_task_with_nan_is_left_out_and_changes_no_bit_of_the_others",
        "imaml:_add_terms",
        "jnp.where(counts, _NEW, 0)",
        "_NEW",
    ),
    _guard(
        "one bad task in a batch: counted",
        "test_a_task_with_nan_is_left_out_and_changes_no_bit_of_the_others",
        "imaml:meta_gradient",
        "_OUT.status != bl.Status.NONFINITE",
        "jnp.bool_(True)",
    ),
    _guard(
        "one bad task in a batch: an adjoint solve with a residual above 1",
        "test_a_task_whose_linear_residual_is_above_1_is_left_out",
        "imaml:meta_gradient",
        "_FINITE & (_RESIDUAL <= 1)",
        "_FINITE",
    ),
    # Dtypes and leaves.
    _guard(
        "dtypes: sums wider than their terms",
        "TestDtypes",
        "_accumulator",
        "[jnp.dtype(jnp.float32), *_FLOATS]",
        "list(_FLOATS)",
    ),
    _guard(
        "dtypes: a factor is cast to the dtype of the leaf",
        "TestDtypes",
        "scale",
        "jnp.asarray(_FACTOR, _LEAF.dtype) * _LEAF",
        "jnp.asarray(_FACTOR, jnp.float32) * _LEAF.astype(jnp.float32)",
    ),
    _guard(
        "leaves: the derivative in an integer leaf is zero",
        "TestLeaves",
        "with_zeros",
        "_DERIVATIVE if is_floating(...) else _ZEROS",
        "_DERIVATIVE",
    ),
    _guard(
        "leaves: complex θ refused",
        "TestLeaves.test_complex_and_integer_variables_are_refused_with_a_reason",
        "real_arrays",
        "jnp.issubdtype(...)",
        "False",
    ),
    _guard(
        "leaves: inner variables that are not floating point refused",
        "TestLeaves.test_complex_and_integer_variables_are_refused_with_a_reason",
        "starting_point",
        "not tree.is_floating(...)",
        "False",
    ),
    # Points at which a derivative is one-sided.
    _guard(
        "kinks: a kink at the point",
        "test_a_kink_is_found_and_its_smooth_variant_is_not",
        "_check_kinks",
        "not at_the_point",
        "True",
    ),
    _guard(
        "kinks: a projection at its bound",
        "test_a_projection_at_its_bound_is_a_kink",
        "_nearest_kink_on_line",
        "any(...)",
        "False",
    ),
    # Programs that are compiled once.
    _guard(
        "recompilation",
        "test_one_trace_per_shape",
        "value_and_hypergradient",
        "partial(jax.jit, ...)",
        "lambda function: function",
    ),
    _guard(
        "recompilation of an outer step",
        "test_calls_with_the_same_objects_compile_once",
        "compiled_loop",
        "_cached_loop(...)",
        "CompiledLoop(setup, capacity, observe)",
    ),
    # The outer loop of minimize.
    _guard(
        "an outer step that failed changes nothing",
        "test_the_loop_stops_at_the_first_failed_step_and_names_it",
        "outer_step",
        "halt & _FAILED",
        "halt & False",
    ),
    _guard(
        "the inner solver's memory goes on",
        "test_the_schedule_and_the_moments_of_the_inner_solver_go_on",
        "outer_step",
        "resumed(solver, memory)",
        "solver",
    ),
    _guard(
        "a batch in a reused buffer is copied",
        "test_an_iterator_may_use_one_buffer_for_all_batches",
        "owned",
        "leaf.copy()",
        "leaf",
    ),
    # Scales far from one.
    _guard(
        "tiny and huge cotangents: the right-hand side is normalised",
        "test_scales_with_the_right_hand_side",
        "normalise",
        "jnp.where(_SOUND, _SIZE, jnp.ones_like(_SIZE))",
        "jnp.ones_like(_SIZE)",
    ),
    _guard(
        "tiny and huge cotangents: a norm whose squares do not underflow",
        "test_scales_with_the_right_hand_side",
        "_scaled_norm",
        "jnp.where(_SOUND, _PEAK, jnp.ones_like(_PEAK))",
        "jnp.ones_like(_PEAK)",
    ),
)


def id_of(root: Path, tests: Sources, name: str) -> str:
    """Return pytest's identifier of a test: file::class::function, the file relative to ``root``."""
    path = tests.find(name).path.relative_to(root).as_posix()
    return "::".join([path, *name.rpartition(":")[2].split(".")])


def main() -> int:
    faults = chosen([guard.fault for guard in GUARDS], __doc__)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_into(Path(folder), "bilevel", "imaml", "tests", "pytest_bilevel.py", "pyproject.toml")
        tests = Sources.read(copy, "tests")
        planned = [(guard.fault, [id_of(copy, tests, guard.test)]) for guard in GUARDS if guard.fault in faults]
        unchanged = list(dict.fromkeys(test for _, [test] in planned))
        return run(copy, Sources.read(copy, "bilevel", "imaml"), planned, unchanged)


if __name__ == "__main__":
    sys.exit(main())
