"""The functions that replace those of `jaxopt.projection` and `jaxopt.prox`, by their names in jaxopt.

jaxopt's projections without a closed form stop at residuals of 1e-3 to 1e-5, fail for large or unevenly scaled inputs,
and support only reverse-mode differentiation. Several of its projections with a closed form divide by zero at a kink.
"""

import functools

import jax
import jax.numpy as jnp

from bilevel._jaxopt import closed_forms, polyhedra, proximal, transport


def _at_least_float32(function):
    """Wrap a function to compute in float32 for bfloat16 and float16, for which JAX has no linear algebra."""

    @functools.wraps(function)
    def widened(x, *args, **options):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if wide == x.dtype:
            return function(x, *args, **options)
        return function(x.astype(wide), *jax.tree.map(lambda leaf: leaf.astype(wide), args), **options).astype(x.dtype)

    return widened


BY_NAME = {
    "projection_affine_set": _at_least_float32(polyhedra.affine_set),
    "projection_polyhedron": _at_least_float32(polyhedra.polyhedron),
    "projection_transport": _at_least_float32(transport.transport),
    "projection_birkhoff": _at_least_float32(transport.birkhoff),
    "kl_projection_transport": _at_least_float32(transport.kl_transport),
    "kl_projection_birkhoff": _at_least_float32(transport.kl_birkhoff),
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
"""A function of jaxopt that is not in this table has none of these defects and is used unchanged."""
