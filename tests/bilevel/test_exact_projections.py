"""Projections of any scale in float32 and float64 are checked by SciPy, and derivatives at kinks are finite.

These checks share no code with the projections. Among the matrices V ≥ 0 with given row and column sums, T is the
nearest to S if and only if none of them has ⟨S − T, V⟩ > ⟨S − T, T⟩. SciPy finds the V with the largest ⟨S − T, V⟩ by
linear programming. The same holds in the KL divergence with S − log T in place of S − T. A point y of a polyhedron is
the nearest to x if and only if x − y is a combination of the active rows, without negative factors for inequalities.
SciPy finds the factors by non-negative least squares.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from jax.sharding import AxisType, PartitionSpec

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWS = 300
SCALES = np.geomspace(0.1, 100.0, DRAWS)


def projection(name, params=None):
    """Return the projection as a function f(x, theta), where θ stands for the parameters of the set."""
    function = bl.jaxopt_projection(name, (lambda theta, data: theta) if params is None else params)
    return lambda x, theta=None: function(x, theta, None)


TRANSPORT = {name: projection(name) for name in ("projection_transport", "kl_projection_transport")}
BIRKHOFF = {name: bl.jaxopt_projection(name) for name in ("projection_birkhoff", "kl_projection_birkhoff")}
ON_MATRICES = TRANSPORT | BIRKHOFF


def drawn_matrices(name, shape, scales=SCALES):
    """Return similarities ``[draws, m, n]`` of increasing scale, and the row and column sums of their projections."""
    rng = np.random.default_rng(len(name))
    similarity = scales[:, None, None] * rng.normal(size=(scales.size, *shape))
    if name in BIRKHOFF:
        return similarity, *(np.ones((scales.size, size)) for size in shape)
    return similarity, *(rng.dirichlet(np.ones(size), scales.size) for size in shape)


def project_matrices(name, similarity, rows, columns):
    if name in BIRKHOFF:
        return jax.jit(jax.vmap(lambda s: BIRKHOFF[name](s, None, None)))(similarity)
    return jax.jit(jax.vmap(TRANSPORT[name]))(similarity, (rows, columns))


def advantage(name, similarity, plan):
    """Return max ⟨D, V − T⟩ over all V ≥ 0 with the sums of T, divided by max(1, max |D|).

    D is S − T, or S − log T for a KL projection.
    """
    score = similarity - (np.log(np.maximum(plan, 1e-300)) if name.startswith("kl") else plan)
    if name in BIRKHOFF:
        best = score[scipy.optimize.linear_sum_assignment(score, maximize=True)].sum()
    else:
        m, n = plan.shape
        sums = np.concatenate([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
        equal = np.concatenate([plan.sum(1), plan.sum(0)])
        size = np.abs(score).max()
        best = -size * scipy.optimize.linprog(-score.ravel() / size, A_eq=sums, b_eq=equal).fun
    return (best - np.sum(score * plan)) / max(1, np.abs(score).max())


@pytest.mark.slow("judges 300 drawn projections by linear programs")
@pytest.mark.parametrize("shape", [(3, 3), (6, 6), (4, 9)])
@pytest.mark.parametrize("name", ON_MATRICES)
def test_matrices_of_every_scale_are_projected_to_rounding(name, shape):
    if name in BIRKHOFF and shape[0] != shape[1]:
        shape = (10, 10)
    drawn = drawn_matrices(name, shape)
    size = np.maximum(1, np.abs(drawn[0]).max((1, 2)))[:, None]
    plans = {}
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        plan = np.asarray(project_matrices(name, *(part.astype(dtype) for part in drawn)))
        assert plan.dtype == dtype
        assert plan.min() >= 0
        for axis, sums in ((2, drawn[1]), (1, drawn[2])):
            assert (np.abs(plan.sum(axis) - sums) <= tolerance * size).all()  # also false for NaN
        plans[dtype] = plan
    # HiGHS solves linear programs to 1e-7, and SciPy solves the assignment problem to rounding.
    allowed = 1e-10 if name in BIRKHOFF else 1e-7
    assert max(advantage(name, s, plan) for s, plan in zip(drawn[0], plans[np.float64], strict=True)) < allowed
    # Rounding the similarities to float32 moves the nearest matrix by at most as much as it moves the similarities.
    assert (np.abs(plans[np.float32] - plans[np.float64]) <= 1e-6 * shape[0] * size[..., None]).all()


@pytest.mark.slow("judges drawn projections by linear programs")
@pytest.mark.parametrize("name", TRANSPORT)
def test_uneven_similarities_with_uneven_sums_are_projected_to_rounding(name):
    # In half of the draws the first entry is far above all others. The sums differ by several orders of magnitude.
    rng = np.random.default_rng(0)
    similarity = np.geomspace(1e-2, 1e4, 60)[:, None, None] * rng.normal(size=(60, 5, 5))
    similarity[:30, 0, 0] = np.geomspace(1e3, 1e8, 30)
    rows, columns = (sums / sums.sum(1, keepdims=True) for sums in np.exp(3 * rng.normal(size=(2, 60, 5))))
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-6)):
        plan = np.asarray(project_matrices(name, *(part.astype(dtype) for part in (similarity, rows, columns))))
        assert (np.abs(plan.sum(2) - rows) <= tolerance).all()
        assert (np.abs(plan.sum(1) - columns) <= tolerance).all()
        if dtype == np.float64:
            assert max(advantage(name, s, one) for s, one in zip(similarity, plan, strict=True)) < 1e-7


@pytest.mark.slow("compiles a projection for each shape", fast="similarity0-*")
@pytest.mark.parametrize(
    ("similarity", "sums", "expected"),
    [
        (10 * np.eye(3), None, np.eye(3)),
        (1e8 * np.eye(3)[::-1], None, np.eye(3)[::-1]),
        (np.full((3, 3), 7.0), None, np.full((3, 3), 1 / 3)),
        (np.array([[1.0, 2.0], [3.0, 4.0]]), ([0.4, 0.6], [0.5, 0.5]), [[0.2, 0.2], [0.3, 0.3]]),
        (np.array([[5.0, 0.0], [0.0, 0.0], [1.0, 9.0]]), ([0.5, 0.0, 0.5], [0.5, 0.5]), [[0.5, 0], [0, 0], [0, 0.5]]),
        (np.array([[-np.inf, 0.0], [0.0, 0.0]]), ([0.3, 0.7], [0.6, 0.4]), [[0, 0.3], [0.6, 0.1]]),
    ],
)
def test_degenerate_matrices_have_known_projections(similarity, sums, expected):
    with jax.numpy_rank_promotion("raise"):
        if sums is None:
            plan = jax.jit(BIRKHOFF["projection_birkhoff"])(similarity, None, None)
        else:
            plan = jax.jit(TRANSPORT["projection_transport"])(similarity, tuple(map(jnp.asarray, sums)))
    np.testing.assert_allclose(plan, expected, atol=1e-14)


def test_the_kl_projection_of_two_by_two_matrices_has_a_closed_form():
    # T = [[p, 1 − p], [1 − p, p]] with p/(1 − p) = exp(½(S₀₀ + S₁₁ − S₀₁ − S₁₀)).
    similarity = np.random.default_rng(0).normal(size=(60, 2, 2)) * np.geomspace(0.1, 1e6, 60)[:, None, None]
    plan = project_matrices("kl_projection_birkhoff", similarity, None, None)
    exponent = 0.5 * (similarity[:, 0, 0] + similarity[:, 1, 1] - similarity[:, 0, 1] - similarity[:, 1, 0])
    # Rounding errors of the similarities are magnified by the exponential function.
    expected, tolerance = scipy.special.expit(exponent), 1e-15 * (1 + np.abs(similarity).max((1, 2)))
    for entry, value in (((0, 0), expected), ((1, 1), expected), ((0, 1), scipy.special.expit(-exponent))):
        assert (np.abs(plan[:, *entry] - value) <= 4 * tolerance).all()


@pytest.mark.slow("compiles three derivatives")
@pytest.mark.parametrize("s", [0.7, 12.0])
def test_the_kl_projection_has_exact_derivatives_up_to_the_third_order(s):
    def entry(s):  # the p of the closed form above, for S₀₀ = s and zeros elsewhere
        return BIRKHOFF["kl_projection_birkhoff"](jnp.array([[s, 0.0], [0.0, 0.0]]), None, None)[0, 0]

    def derivatives(function):
        return [(function := jax.grad(function)) for _ in range(3)]

    for ours, exact in zip(derivatives(entry), derivatives(lambda s: jax.nn.sigmoid(0.5 * s)), strict=True):
        np.testing.assert_allclose(jax.jit(ours)(s), exact(s), rtol=1e-9)


@pytest.mark.slow("compiles both projections")
@pytest.mark.parametrize("name", TRANSPORT)
def test_sums_that_disagree_have_no_projection(name):
    assert np.isnan(jax.jit(TRANSPORT[name])(jnp.eye(3), (jnp.ones(3), jnp.full(3, 1.01)))).all()


@pytest.mark.slow("compiles a projection for each pair of dtypes")
@pytest.mark.parametrize("of_sums", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("of_similarity", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", TRANSPORT)
def test_sums_that_agree_up_to_their_rounding_have_a_projection(name, of_similarity, of_sums):
    rows, columns = (jnp.asarray(sums).astype(of_sums) for sums in ([0.4, 0.6], [0.5, 0.5]))
    plan = TRANSPORT[name](jnp.array([[1.0, 2.0], [3.0, 4.0]]).astype(of_similarity), (rows, columns))
    assert plan.dtype == of_similarity
    rounding = max(float(jnp.finfo(dtype).eps) for dtype in (of_similarity, of_sums))
    np.testing.assert_allclose(plan.astype(float), [[0.2, 0.2], [0.3, 0.3]], atol=rounding)
    wrong = TRANSPORT[name](jnp.eye(2).astype(of_similarity), (rows, 1.1 * columns))
    assert np.isnan(wrong.astype(float)).all()


def polyhedra(m, k, rng):
    """Draw points x ``[draws, 6]`` and polyhedra with m equalities and k inequalities, whose rows differ in length."""
    inside = SCALES[:, None] * rng.normal(size=(DRAWS, 6))
    x = inside + 2 * SCALES[:, None] * rng.normal(size=(DRAWS, 6))
    equal, unequal = (
        np.exp(3 * rng.normal(size=(DRAWS, rows, 1))) * rng.normal(size=(DRAWS, rows, 6)) for rows in (m, k)
    )
    b, h = (np.einsum("dij,dj->di", rows, inside) for rows in (equal, unequal))
    # About 30 % of the inequalities are active at the point `inside`. Many of the polyhedra are thin cones.
    slack = rng.exponential(size=h.shape) * (rng.random(h.shape) < 0.7)
    return x, (equal, b, unequal, h + slack * SCALES[:, None] * np.linalg.norm(unequal, axis=2))


def judged(x, y, equal, b, unequal, h):
    """Return by how much y violates the constraints and the optimality condition, relative to x."""
    size = np.abs(x).max()
    lengths = [np.linalg.norm(rows, axis=1) for rows in (equal, unequal)]
    slack = (h - unequal @ y) / lengths[1] / size
    violation = max(np.abs((equal @ y - b) / lengths[0] / size).max(initial=0), -slack.min(initial=0))
    normals = np.concatenate([equal, -equal, unequal[slack < 1e-9]])
    normals = normals / np.linalg.norm(normals, axis=1)[:, None]
    left = np.linalg.norm(x - y) / size
    return violation, scipy.optimize.nnls(normals.T, (x - y) / size)[1] if len(normals) else left


@pytest.mark.slow("judges 300 drawn projections by least squares", fast="2-0")
@pytest.mark.parametrize(("m", "k"), [(0, 10), (2, 0), (2, 10), (3, 30)])
def test_polyhedra_with_rows_of_every_length_are_projected_to_rounding(m, k):
    x, constraints = polyhedra(m, k, np.random.default_rng(m + k))
    project = jax.jit(jax.vmap(projection("projection_polyhedron")))
    y = np.asarray(project(x, constraints))
    violation, stationarity = np.array([judged(*case) for case in zip(x, y, *constraints, strict=True)]).T
    assert (violation <= 1e-13).all() and (stationarity <= 1e-8).all()
    narrow = jax.tree.map(lambda part: part.astype(np.float32), (x, constraints))
    y32 = np.asarray(project(*narrow)).astype(float)
    assert np.isfinite(y32).all()
    rounded = jax.tree.map(lambda part: part.astype(float), narrow)
    violation = np.array([judged(*case)[0] for case in zip(rounded[0], y32, *rounded[1], strict=True)])
    assert (violation <= 1e-5).all()
    difference = np.abs(y32 - y).max(1) / np.abs(x).max(1)
    # Nearly parallel rows magnify the rounding of the constraints, in a few of the draws by a factor above 100.
    assert np.median(difference) < 1e-6 and difference.max() < 1e-3


@pytest.mark.slow("compiles a polyhedron with each kind of constraint")
def test_a_polyhedron_may_lack_each_kind_of_constraint():
    x, project = jnp.array([3.0, -1.0]), jax.jit(projection("projection_polyhedron"))
    row, no_rows = (jnp.array([[2000.0, 2000.0]]), jnp.array([1000.0])), (jnp.zeros((0, 2)), jnp.zeros(0))
    for absent in ((None, None), no_rows):
        np.testing.assert_allclose(project(x, (*row, *absent)), [2.25, -1.75], rtol=1e-14)
        np.testing.assert_allclose(project(x, (*absent, *row)), [2.25, -1.75], rtol=1e-14)
        np.testing.assert_array_equal(project(x, (*absent, *absent)), x)
        np.testing.assert_array_equal(project(x, (*absent, jnp.eye(2), jnp.full(2, jnp.inf))), x)
    affine = projection("projection_affine_set")
    scaled = jnp.array([[1e-6, 0.0], [0.0, 1e6]]), jnp.array([2e-6, 3e6])
    for dtype in (jnp.float32, jnp.float64):
        y = affine(x.astype(dtype), jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), scaled))
        np.testing.assert_allclose(y, [2.0, 3.0], rtol=1e-6)


@pytest.mark.slow("differentiates 300 drawn projections in two modes and two precisions")
@pytest.mark.parametrize("name", ON_MATRICES)
def test_derivatives_of_matrices_equal_central_differences(name):
    similarity, rows, columns = drawn_matrices(name, (5, 5))
    rng = np.random.default_rng(1)
    direction = rng.normal(size=(5, 5)), *(v - v.mean() for v in rng.normal(size=(2, 5)))

    def along(step, similarity, rows, columns):
        d, e, f = (jnp.asarray(part, step.dtype) for part in direction)
        if name in BIRKHOFF:
            return BIRKHOFF[name](similarity + step * d, None, None)
        moved = rows + 0.1 * rows.min() * step * e, columns + 0.1 * columns.min() * step * f
        return TRANSPORT[name](similarity + step * d, moved)

    # The Euclidean projection is linear between two kinks, so the step may grow with the scale.
    steps = np.full(DRAWS, 1e-5) * (1 if name.startswith("kl") else SCALES)
    batched = jax.jit(jax.vmap(along))
    ahead, behind = (np.asarray(batched(sign * steps, similarity, rows, columns)) for sign in (1, -1))
    expected = (ahead - behind) / (2 * steps[:, None, None])
    for dtype, tolerance in ((np.float64, 1e-8), (np.float32, 1e-4)):
        case = [part.astype(dtype) for part in (np.zeros(DRAWS), similarity, rows, columns)]
        # A derivative is left out if an entry changes between zero and positive within the step.
        here = np.asarray(batched(*case)) > 0
        is_smooth = ((here == (ahead > 0)) & (here == (behind > 0))).all((1, 2)) | name.startswith("kl")
        assert (~is_smooth).sum() <= 3
        for mode in (jax.jacfwd, jax.jacrev):
            derivative = np.asarray(jax.jit(jax.vmap(mode(along)))(*case))
            assert np.abs(derivative - expected)[is_smooth].max() < tolerance
    assert np.abs(expected).max() > 0.1


@pytest.mark.slow("differentiates 300 drawn projections")
@pytest.mark.parametrize(("m", "k"), [(0, 10), (2, 0), (2, 10)])
def test_derivatives_of_polyhedra_equal_central_differences(m, k):
    rng = np.random.default_rng(5)
    x, (equal, b, unequal, h) = polyhedra(m, k, rng)
    sizes = [np.linalg.norm(rows, axis=2) for rows in (equal, unequal)]
    of_x = SCALES[:, None]
    scales = of_x, (sizes[0][..., None], sizes[0] * of_x, sizes[1][..., None], sizes[1] * of_x)
    case = x, (equal, b, unequal, h)
    directions = jax.tree.map(lambda part, scale: scale * rng.normal(size=part.shape), case, scales)

    def moved(step):
        return jax.tree.map(lambda part, direction: part + step * direction, case, directions)

    def along(step, case, directions):
        return projection("projection_polyhedron")(*jax.tree.map(lambda part, d: part + step * d, case, directions))

    def active(step, y):
        """Return which inequalities hold with equality at y, up to rounding."""
        _, (_, _, rows, bounds) = moved(step)
        return bounds - np.einsum("dij,dj->di", rows, y) < 1e-10 * sizes[1] * SCALES[:, None]

    batched = jax.jit(jax.vmap(along, (None, 0, 0)))
    step = 1e-6
    ahead, here, behind = (np.asarray(batched(sign * step, case, directions)) for sign in (1, 0, -1))
    expected = (ahead - behind) / (2 * step)
    # A derivative is left out if the active inequalities change within the step, as at the vertex of a thin cone in
    # which more constraints meet than there are unknowns.
    is_smooth = ((active(step, ahead) == active(0, here)) & (active(-step, behind) == active(0, here))).all(1)
    for mode in (jax.jacfwd, jax.jacrev):
        derivative = np.asarray(jax.jit(jax.vmap(mode(along), (None, 0, 0)))(0.0, case, directions))
        error = np.abs(derivative - expected).max(1) / (np.abs(expected).max(1) + SCALES)
        assert error[is_smooth].max() < 1e-6
    assert (~is_smooth).sum() <= 12


ZERO, POINT = np.zeros(3), np.array([3.0, 0.0, 4.0])
UNIT = POINT / 5
KINKS = {
    # The name of the function, a point, the parameters, the value, and its Jacobians in the point and the parameters.
    "a ball of any radius at its centre": ("projection_l2_ball", ZERO, 1.0, ZERO, np.eye(3), ZERO),
    "a ball of radius 0": ("projection_l2_ball", POINT, 0.0, ZERO, np.zeros((3, 3)), UNIT),
    "a ball of radius 0 at its centre": ("projection_l2_ball", ZERO, 0.0, ZERO, np.zeros((3, 3)), ZERO),
    "an l1 ball of radius 0": ("projection_l1_ball", POINT, 0.0, ZERO, np.diag([0.0, 0, 0]), np.eye(3)[2]),
    "a cube of size 0": ("projection_linf_ball", POINT - 1, 0.0, ZERO, np.zeros((3, 3)), np.array([1.0, -1, 1])),
    "a simplex of sum 0": ("projection_simplex", POINT, 0.0, ZERO, np.zeros((3, 3)), np.eye(3)[2]),
    "a group at 0": ("prox_group_lasso", ZERO, 1.0, ZERO, np.zeros((3, 3)), ZERO),
    "a group at 0 without a penalty": ("prox_group_lasso", ZERO, 0.0, ZERO, np.eye(3), ZERO),
    "a group without a penalty": ("prox_group_lasso", POINT, 0.0, POINT, np.eye(3), -UNIT),
    "a lasso without a penalty": ("prox_lasso", POINT, 0.0, POINT, np.eye(3), -np.sign(POINT)),
    "a sphere at its centre": ("projection_l2_sphere", ZERO, 2.0, np.full(3, 2 / 3**0.5), np.zeros((3, 3)), 3**-0.5),
    "a plane with a row of zeros": ("projection_hyperplane", POINT, (ZERO, 0.0), POINT, np.eye(3), None),
    "a half-space with a row of zeros": ("projection_halfspace", POINT, (ZERO, 1.0), POINT, np.eye(3), None),
}


@pytest.mark.slow("compiles each projection in both modes and precisions", fast=("a ball of radius 0 at its centre",))
@pytest.mark.parametrize("kink", KINKS)
def test_derivatives_at_kinks_are_finite_and_those_of_one_side(kink):
    name, point, params, value, in_point, in_params = KINKS[kink]
    if name.startswith("prox"):
        prox = bl.jaxopt_prox(name, lambda theta, data: theta)
        function = lambda x, theta: prox(x, theta, None, 1.0)  # noqa: E731
    else:
        function = projection(name)

    @jax.jit
    def everything(x, theta):
        return function(x, theta), jax.jacrev(function, (0, 1))(x, theta), jax.jacfwd(function, (0, 1))(x, theta)

    for dtype in (jnp.float64, jnp.float32):
        x, theta = jax.tree.map(lambda leaf, dtype=dtype: jnp.asarray(leaf, dtype), (point, params))
        with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
            out, jacobians, forward = everything(x, theta)
        assert out.dtype == dtype
        np.testing.assert_allclose(out, value, rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), forward, jacobians)
        np.testing.assert_allclose(jacobians[0], in_point, atol=1e-6)
        if in_params is not None:
            np.testing.assert_allclose(jacobians[1], np.broadcast_to(in_params, 3), atol=1e-6)


def test_radii_and_sums_below_zero_have_no_projection():
    for name in ("simplex", "l1_ball", "l1_sphere", "l2_ball", "l2_sphere", "linf_ball", "hypercube"):
        assert np.isnan(jax.jit(projection(f"projection_{name}"))(POINT, -1.0)).all()
    assert np.isnan(jax.jit(projection("projection_halfspace"))(POINT, (np.zeros(3), np.array(-1.0)))).all()


@pytest.mark.slow("compiles each projection for a NaN")
def test_nan_is_passed_on():
    x = jnp.array([1.0, jnp.nan, 2.0])
    for name in ("simplex", "l1_ball", "l1_sphere", "l2_ball", "l2_sphere", "linf_ball"):
        assert np.isnan(jax.jit(projection(f"projection_{name}"))(x, 1.0)).any()
    for name in ("prox_lasso", "prox_group_lasso"):
        assert np.isnan(jax.jit(bl.jaxopt_prox(name))(x, None, None, 0.5)).any()
    matrix = jnp.eye(3).at[0, 1].set(jnp.nan)
    assert np.isnan(jax.jit(BIRKHOFF["projection_birkhoff"])(matrix, None, None)).all()


@pytest.mark.slow("compiles several projections")
def test_closed_forms_keep_their_digits_at_every_scale():
    x = np.array([0.3, -1.2, 0.7], np.float32)
    for scale in (1e-30, 1e30):
        ball = projection("projection_l2_ball")(jnp.asarray(scale * x), jnp.float32(scale))
        np.testing.assert_allclose(ball / scale, x / np.linalg.norm(x), rtol=1e-6)
        plane = projection("projection_hyperplane")(jnp.asarray(x), (jnp.asarray(scale * x), jnp.float32(0)))
        np.testing.assert_allclose(plane, 0, atol=1e-6)
    far = np.float32(2**20) + np.arange(5, dtype=np.float32) / 8
    expected = projection("projection_simplex")(jnp.arange(5.0) / 8, 1.0)
    np.testing.assert_allclose(projection("projection_simplex")(jnp.asarray(far), jnp.float32(1)), expected, atol=1e-6)
    # An entry 0 moves too: both entries gain 0.45 in absolute value, because 0.1 + 0.45 + 0.45 = 1.
    sphere = projection("projection_l1_sphere")(jnp.array([-0.1, 0.0]), 1.0)
    np.testing.assert_allclose(sphere, [-0.55, 0.45], rtol=1e-12)
    tree = {"a": jnp.ones(2), "b": jnp.float64(3.0)}
    clipped = projection("projection_box")(tree, (-0.5, 0.5))  # the two numbers are the bounds of every leaf
    np.testing.assert_array_equal(clipped["a"], 0.5)


def test_a_box_section_may_have_infinite_bounds_and_weights_of_every_sign():
    rng = np.random.default_rng(0)
    project = jax.jit(jax.vmap(projection("projection_box_section")))
    x, weights = 10 * rng.normal(size=(200, 5)), rng.normal(size=(200, 5)) * np.exp(3 * rng.normal(size=(200, 1)))
    low, high = np.sort(rng.normal(size=(2, 200, 5)), axis=0)
    inside = low + rng.random((200, 5)) * (high - low)
    low[rng.random((200, 5)) < 0.3], high[rng.random((200, 5)) < 0.3] = -np.inf, np.inf
    weights[rng.random((200, 5)) < 0.1] = 0
    c = (weights * inside).sum(1)
    y = np.asarray(project(x, (low, high, weights, c)))
    assert ((low <= y + 1e-12) & (y - 1e-12 <= high)).all()
    np.testing.assert_allclose((weights * y).sum(1), c, rtol=1e-11, atol=1e-11)
    for k in range(200):  # y = clip(x + τ·weights, low, high) with the same τ for all entries
        free = (y[k] > low[k] + 1e-9) & (y[k] < high[k] - 1e-9) & (weights[k] != 0)
        if free.any():
            tau = ((y - x)[k, free] / weights[k, free]).mean()
            np.testing.assert_allclose(y[k], np.clip(x[k] + tau * weights[k], low[k], high[k]), atol=1e-8)


@pytest.mark.slow("compiles two projections and their derivatives")
@pytest.mark.parametrize("toward", [-np.inf, np.inf])
def test_supports_do_not_depend_on_the_last_digit_of_a_sorted_vector(toward, monkeypatch):
    # XLA may compute the same number with one rounding error in the sorted vector, and with another one in the entries
    # that are compared with it.
    x = jnp.array([0.5, 0.9, 0.3, -2.0])
    free, bounds = np.eye(4)[:3], (jnp.full(4, -0.5), jnp.full(4, 0.4), jnp.ones(4), 0.3)
    cases = [
        (projection("projection_simplex"), None, [4 / 15, 2 / 3, 1 / 15, 0.0], free.T @ (np.eye(3) - 1 / 3) @ free),
        # 0.9 is above its bound 0.4, −2 is below its bound −0.5, and the other two entries move by the same amount.
        (projection("projection_box_section"), bounds, [0.3, 0.4, 0.1, -0.5],
         np.outer([1, 0, -1, 0], [0.5, 0, -0.5, 0])),
    ]  # fmt: skip
    sort = jnp.sort
    monkeypatch.setattr(jnp, "sort", lambda v: jnp.nextafter(sort(v), jnp.asarray(toward, v.dtype)))
    for function, params, point, slope in cases:
        np.testing.assert_allclose(function(x, params), point, atol=1e-14)
        np.testing.assert_allclose(jax.jacfwd(function)(x, params), slope, atol=1e-14)


@pytest.mark.slow("compiles a projection inside shard_map")
@pytest.mark.parametrize("name", ON_MATRICES)
def test_devices_project_their_own_matrices(name):
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(AxisType.Auto,))
    drawn = drawn_matrices(name, (3, 3), np.array([1.0, 10.0]))
    spec = PartitionSpec("tasks")
    on_devices = jax.shard_map(functools.partial(project_matrices, name), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(on_devices)(*drawn), project_matrices(name, *drawn), atol=1e-14)


@pytest.mark.slow("compiles each projection in half precision")
@pytest.mark.parametrize("name", ["projection_birkhoff", "projection_polyhedron", "projection_simplex"])
def test_half_precision_is_kept(name):
    x = jnp.eye(3) if name == "projection_birkhoff" else jnp.arange(3.0)
    params = {"projection_polyhedron": (jnp.ones((1, 3)), jnp.ones(1), jnp.eye(3), jnp.ones(3))}.get(name)
    project = bl.jaxopt_projection(name, None if params is None else lambda theta, data: theta)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, params))
    out = project(half[0], half[1], None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(float), project(x, params, None), atol=1e-2)
