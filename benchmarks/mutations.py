"""Check that the test kit, `bilevel.testing`, finds wrong hypergradients in copies of `bilevel` with a planted fault.

    python -m benchmarks.mutations [NAME …]

The tests in `mutation_suite.py` use the test kit. They must pass on the unchanged copy and fail on every fault. The
exit status is 1 if they fail on the unchanged copy, or if they pass on a copy with a fault. `planting.py` says how a
fault is written.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.fault_runs import chosen, copy_into, run
from benchmarks.planting import Fault, Sources

SUITE = Path(__file__).with_name("mutation_suite.py")

MUTATIONS = (
    # The implicit function theorem: the hypergradient is h − Bᵀv with Aᵀv = g. A and B are the condition's derivatives
    # with respect to w and θ, and g and h those of the outer function.
    Fault("adjoint term's sign", "Implicit.__call__", "tree.subtract(_H, _BV)", "tree.add(_H, _BV)"),
    Fault("direct term lost", "Implicit.__call__", "tree.subtract(_H, _BV)", "tree.subtract(tree.scale(0, _H), _BV)"),
    Fault(
        "half the adjoint term",
        "Implicit.__call__",
        "tree.subtract(_H, _BV)",
        "tree.subtract(_H, tree.scale(0.5, _BV))",
    ),
    Fault("transpose dropped", "adjoint_matvec", "is_gradient(...)", "True"),
    Fault("transpose dropped in the layer", "solve_implicitly", "is_gradient(...)", "True"),
    Fault(
        "B at a wrong argument",
        "pull_back_to_theta",
        "condition.residual(w, _THETA, _DATA)",
        "condition.residual(adjoint, _THETA, _DATA)",
    ),
    Fault("scaling D missing once", "solve_scaled", "_V = tree.scale(_D, _U)", "_V = _U"),
    Fault("scaling D missing in the product", "scaled_operator", "tree.scale(_D, matvec(_DU))", "matvec(_DU)"),
    Fault(
        "linear_init ignored",
        "solve_scaled",
        "solve_linear(_SOLVER, matvec, _B, _SYMMETRIC, _INIT)",
        "solve_linear(_SOLVER, matvec, _B, _SYMMETRIC)",
    ),
    # The other methods.
    Fault(
        "one step short", "Unrolled", "jax.lax.fori_loop(0, last, _STEP, _W)", "jax.lax.fori_loop(1, last, _STEP, _W)"
    ),
    Fault("truncation ignored", "Unrolled", "last < _STEPS", "False"),
    Fault(
        "init's derivative lost",
        "Unrolled",
        "starting_point(_INIT, _THETA, _DATA)",
        "jax.lax.stop_gradient(starting_point(_INIT, _THETA, _DATA))",
    ),
    Fault(
        "tangent of w lost",
        "ForwardUnrolled",
        "outer_with_aux(_PROBLEM)(_W, _THETA, _DATA)",
        "outer_with_aux(_PROBLEM)(jax.lax.stop_gradient(_W), _THETA, _DATA)",
    ),
    Fault("OneStep's sign", "OneStep", "tree.add(_H, _BV)", "tree.subtract(_H, _BV)"),
    Fault("FirstOrder's sign", "FirstOrder", "tree.subtract(_H, _BV)", "tree.add(_H, _BV)"),
    Fault(
        "sign after differences", "FiniteDifference", "tree.subtract(outer_theta, _BV)", "tree.add(outer_theta, _BV)"
    ),
    Fault("penalty forgotten", "ValuePenalty", "tree.scale(self.penalty, _DIFFERENCE)", "_DIFFERENCE"),
    Fault("slopes doubled", "EvolutionStrategies", "_DIFFERENCE / (2 * self.scale)", "_DIFFERENCE / self.scale"),
    # Conditions.
    Fault("λ dropped", "Proximal._pull", "tree.scale(_STRENGTH, _AWAY)", "tree.scale(1.0, _AWAY)"),
    Fault("fixed point's sign", "FixedPoint.residual", "tree.subtract(_W, _MAPPED)", "tree.add(_W, _MAPPED)"),
    Fault("complementarity without its multiplier", "KKT.residual", "jax.tree.map(jnp.multiply, _MU, _G)", "_G"),
    Fault(
        "multiplier's sign",
        "KKT.residual",
        "pull_back((_ONE, _NU, _MU))",
        "pull_back((_ONE, jax.tree.map(jnp.negative, _NU), _MU))",
    ),
    Fault("ascent in place of descent", "constrained:descend", "tree.subtract(_W, _STEP)", "tree.add(_W, _STEP)"),
    Fault("prox with half its step", "ProximalGradient.mapping", "self.step_size", "0.5 * self.step_size"),
    # Inner solvers.
    Fault("stale iterate", "iterate", "report(residual(_W), _W, steps=_N)", "report(residual(_W), init, steps=_N)"),
    Fault("Anderson's mix reversed", "Anderson", "_VALUE - _times(_MIX, _STEPS)", "_VALUE + _times(_MIX, _STEPS)"),
    Fault("line search backwards", "line_search", "tree.add(_W, _STEP)", "tree.subtract(_W, _STEP)"),
    # Linear solvers.
    Fault("ridge forgotten", "square", "_SUM if ridge else product", "product"),
    Fault(
        "preconditioner twice",
        "_preconditioner",
        "_WIDEN(solver.preconditioner, _B)",
        "_WIDEN(lambda r: solver.preconditioner(solver.preconditioner(r)), _B)",
    ),
    Fault("one product skipped", "Neumann", "tree.subtract(_B, _AX)", "_B"),
    Fault("solution not scaled back", "denormalise", "tree.scale(size, x)", "x"),
    Fault(
        "float32 in a float64 solve",
        "_factorise",
        "solve(flat)",
        "solve(flat).astype('float32').astype(flat.dtype)",
    ),
    Fault("Woodbury without its ridge", "Nystrom._woodbury", "_X / self.ridge", "_X"),
)


def main() -> int:
    faults = chosen(MUTATIONS, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_into(Path(folder), "bilevel", "pytest_bilevel.py")
        shutil.copy(SUITE, copy)
        # pytest must not read this repository's settings, because the kit has to work without them.
        arguments = ["-p", "pytest_bilevel", "-c", os.devnull, "--rootdir", str(copy), str(copy / SUITE.name)]
        return run(copy, Sources.read(copy, "bilevel"), [(fault, arguments) for fault in faults], arguments)


if __name__ == "__main__":
    sys.exit(main())
