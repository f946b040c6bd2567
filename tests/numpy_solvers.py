"""Solvers of small problems in NumPy, and central differences: references that share no code with `bilevel` or JAX."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

TOLERANCE = 1e-11
"""A candidate of an enumeration may violate an optimality condition by this much, which allows for rounding."""


def differences(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Return the Jacobian ``[m, n]`` of a function from vectors to vectors by central differences in float64."""
    columns = [(function(x + step * unit) - function(x - step * unit)) / (2 * step) for unit in np.eye(x.size)]
    return np.stack(columns, axis=1)


def root(residual: Callable[[np.ndarray], np.ndarray], w: Sequence | np.ndarray) -> np.ndarray:
    """Return a root ``[n]`` of an analytic function by Newton's method, which starts at w.

    A column of the Jacobian is the imaginary part of the residual after an imaginary step of length 1e-30, divided by
    this length. It is exact up to rounding. A Newton step that would increase the norm of the residual is halved,
    down to a millionth of its length.
    """
    w = np.asarray(w, float)
    for _ in range(100):
        found = residual(w)
        jacobian = np.stack([residual(w + 1e-30j * unit).imag / 1e-30 for unit in np.eye(w.size)], axis=1)
        step = np.linalg.lstsq(jacobian, found)[0]
        scale = 1.0
        while scale > 1e-6 and not np.linalg.norm(residual(w - scale * step)) <= np.linalg.norm(found):
            scale /= 2
        w = w - scale * step
        if np.linalg.norm(step) <= 1e-15 * (1 + np.linalg.norm(w)):
            break
    assert np.linalg.norm(residual(w)) < 1e-10, "Newton's method has not converged"
    return w


def program(Q, c, A=None, b=None, G=None, h=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the x that minimises ½xᵀQx + cᵀx with Ax = b and Gx ≤ h, and the multipliers ν and μ of these constraints.

    Each set of active inequalities is tried.
    """
    n = len(c)
    A, b = (np.zeros((0, n)), np.zeros(0)) if A is None else (A, b)
    G, h = (np.zeros((0, n)), np.zeros(0)) if G is None else (G, h)
    Q = (Q + Q.T) / 2
    for count in range(min(len(h), n) + 1):
        for active in map(list, itertools.combinations(range(len(h)), count)):
            rows, bounds = np.concatenate([A, G[active]]), np.concatenate([b, h[active]])
            kkt = np.block([[Q, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
            if np.linalg.matrix_rank(kkt) < len(kkt):
                continue
            solved = np.linalg.solve(kkt, np.concatenate([-c, bounds]))
            x, multipliers = solved[:n], np.zeros(len(h))
            multipliers[active] = solved[n + len(b) :]
            if np.all(G @ x <= h + TOLERANCE) and np.all(multipliers >= -TOLERANCE):
                return x, solved[n : n + len(b)], multipliers
    raise AssertionError("no set of active inequalities satisfies the conditions of optimality")


def lasso(hessian: np.ndarray, slope: np.ndarray, strength: float | np.ndarray) -> np.ndarray:
    """Return argmin ½wᵀHw − slopeᵀw + Σ strength·|w|, by trying each pattern of signs."""
    strength = np.broadcast_to(strength, slope.shape)
    for signs in map(np.array, itertools.product((-1.0, 0.0, 1.0), repeat=slope.size)):
        on, w = signs != 0, np.zeros(slope.size)
        w[on] = np.linalg.solve(hessian[np.ix_(on, on)], (slope - strength * signs)[on])
        excess = np.abs(slope - hessian @ w) - strength
        if np.all(signs[on] * w[on] > 0) and np.all(excess[~on] <= TOLERANCE):
            return w
    raise AssertionError("no pattern of signs satisfies the conditions of optimality")
