"""The functions that replace those of `jaxopt.projection` and `jaxopt.prox`, by their names in jaxopt.

jaxopt's projections without a closed form stop at residuals of 1e-3 to 1e-5, fail for large or unevenly scaled inputs,
and support only reverse-mode differentiation. Several of its projections with a closed form divide by zero at a kink.
"""

import functools

import jax
import jax.numpy as jnp

from bilevel._jaxopt import closed_forms, polyhedra, proximal, transport


def _in_widest_precision(function):
    """Wrap a function to compute in the widest dtype of its arguments, and in float32 at least.

    JAX has no linear algebra for bfloat16 and float16. The result has the dtype of the first argument. If an argument
    has a narrower dtype than the computation, its numbers are rounded, so that constraints which hold exactly before
    the rounding may contradict each other. The function then gets the largest machine epsilon of the arguments' dtypes
    as ``rounding``.
    """

    @functools.wraps(function)
    def widened(x, *args, **options):
        dtypes = [leaf.dtype for leaf in jax.tree.leaves((x, args)) if _is_floating_array(leaf)]
        wide = functools.reduce(jnp.promote_types, dtypes, jnp.dtype("float32"))
        if all(dtype == wide for dtype in dtypes):
            return function(x, *args, **options)
        rounding = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
        args = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(wide), args)
        return function(x.astype(wide), *args, rounding=rounding, **options).astype(x.dtype)

    return widened


def _is_floating_array(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


BY_NAME = {
    "projection_affine_set": _in_widest_precision(polyhedra.affine_set),
    "projection_polyhedron": _in_widest_precision(polyhedra.polyhedron),
    "projection_transport": _in_widest_precision(transport.transport),
    "projection_birkhoff": _in_widest_precision(transport.birkhoff),
    "kl_projection_transport": _in_widest_precision(transport.kl_transport),
    "kl_projection_birkhoff": _in_widest_precision(transport.kl_birkhoff),
    "projection_box": closed_forms.box,
    "projection_box_section": closed_forms.box_section,
    "projection_hypercube": closed_forms.hypercube,
    "projection_simplex": closed_forms.simplex,
    "projection_sparse_simplex": closed_forms.sparse_simplex,
    "projection_l1_sphere": closed_forms.l1_sphere,
    "projection_l1_ball": closed_forms.l1_ball,
    "projection_l2_sphere": closed_forms.l2_sphere,
    "projection_l2_ball": closed_forms.l2_ball,
    "projection_linf_ball": closed_forms.linf_ball,
    "projection_hyperplane": closed_forms.hyperplane,
    "projection_halfspace": closed_forms.halfspace,
    "prox_lasso": proximal.lasso,
    "prox_elastic_net": proximal.elastic_net,
    "prox_group_lasso": proximal.group_lasso,
}
"""The replacements, by their names in jaxopt.

A function of jaxopt that is not in this table is exact, has finite derivatives, and is used unchanged.
"""
