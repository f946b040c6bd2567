"""Batches of samples, and the order in which they are drawn, both inside the compiled program.

The samples are divided into batches once: batch i holds the samples from i·b to (i + 1)·b − 1. A batch is therefore one
contiguous slice, which XLA reads without a copy, and a table with one row for each batch has a fixed meaning. If the
samples are ordered, for example by class, call :func:`shuffle` on them once before.

If the batch size b does not divide the number of samples n, the last batch is smaller. Every batch is drawn equally
often, and the terms of a batch are multiplied by its number of samples, divided by the mean number n/(number of
batches). The mean over the batches is then the mean over all samples, and the noise of the few samples in the last
batch has a small weight.

The batch of a draw is a function of the key and the number of the draw. So a sampler has no state, a step costs the
same for any number of samples, and a run that stops and goes on draws the same batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import PyTree

Sampling = Literal["with_replacement", "without_replacement"]

PASS = 4096
"""The largest number of samples in a slice of a pass over all samples, except on a CPU. The memory of a pass grows with
the slice, not with the samples."""
CPU_PASS = 16_384
"""On a CPU, the largest number of samples in a slice of a pass. Each slice has a fixed cost, which dominates if the
samples are small. The temporary arrays of the loss grow with the slice."""
CACHE = 2**21
"""On a CPU, the largest number of bytes in a slice of a pass, unless one batch is larger. The derivatives of a loss
read each sample several times, and only the first time from the memory if the slice fits into the cache."""
FEW = 16
"""Up to this number of batches are ordered by ranks: a Feistel network on so few numbers is biased."""
ROUNDS = 12
"""Rounds of the Feistel network, an even number."""


def shuffle(samples: PyTree, key: jax.Array) -> PyTree:
    """Return the samples in a random order, the same for every leaf.

    Call it once on samples that are ordered, for example by class, because a batch is a contiguous slice. It makes one
    copy of the samples.

    Args:
        samples: a pytree of arrays with one leading axis of samples.
        key: a random key.

    Example:
        >>> samples = {"x": jnp.arange(4), "y": 10 * jnp.arange(4)}
        >>> mixed = shuffle(samples, jax.random.key(0))
        >>> bool((10 * mixed["x"] == mixed["y"]).all()), sorted(mixed["x"].tolist())
        (True, [0, 1, 2, 3])
    """
    samples = tree.arrays(samples, "samples")
    return _take(samples, jax.random.permutation(key, tree.count_samples(samples, "samples")))


@jax.jit
def _take(samples, order):
    return jax.tree.map(lambda leaf: leaf[order], samples)


@dataclass(frozen=True)
class Samples:
    """Samples in batches.

    Attributes:
        data: a pytree of arrays ``[size, …]``.
        size: the number of samples, n.
        batch: the number of samples in a batch, b.
        whole: whether a pass over all samples evaluates them at once, for a function that is not a mean over samples.
        only_full: whether only batches of b samples are asked for, so that :meth:`on_batch` needs no branch.
    """

    data: PyTree
    size: int
    batch: int
    whole: bool = False
    only_full: bool = False

    @property
    def batches(self) -> int:
        """The number of batches, n/b rounded up."""
        return -(-self.size // self.batch)

    @property
    def rest(self) -> int:
        """The number of samples in a smaller last batch; 0 if all batches have b samples."""
        return self.size % self.batch

    @property
    def batch_bytes(self) -> int:
        """The number of bytes in a batch of b samples."""
        return self.batch * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.data)) // self.size

    def is_smaller(self, numbers: jax.Array) -> jax.Array:
        """Return whether a batch is the smaller last one, elementwise."""
        return (numbers == self.batches - 1) & (self.rest > 0)

    def on_batch(self, function: Callable[[PyTree], PyTree], number: jax.Array) -> PyTree:
        """Return ``function(batch)`` for one batch, times the weight of the batch.

        The weight is the number of samples in the batch, divided by the mean number. For a function that is a mean over
        its batch, the mean of the result over all batches is then the function of all samples. Leaves that are not
        floating point are not weighted.
        """

        # Shapes are static, so the smaller last batch is a branch of its own.
        def on_full_batch():
            return function(self._slice(number * self.batch, self.batch))

        def on_smaller_batch():
            return function(self._slice(self.size - self.rest, self.rest))

        if not self.rest:
            return on_full_batch()
        mean = self.size / self.batches
        if self.only_full:
            return tree.scale(self.batch / mean, on_full_batch())
        # The terms are weighted outside of the branches, where XLA can fuse the product with the step that follows.
        is_last = self.is_smaller(number)
        terms = jax.lax.cond(is_last, on_smaller_batch, on_full_batch)
        return tree.scale(jnp.where(is_last, self.rest / mean, self.batch / mean), terms)

    def mean(self, function: Callable[[PyTree], PyTree]) -> PyTree:
        """Return the mean of ``function`` over all samples, for a function that is a mean over its batch."""
        length = self._pass_length()
        if self.whole or self.size <= length:
            return function(self.data)

        def share(start, length):
            """Return the contribution of some samples to the mean."""
            return tree.scale(length / self.size, function(self._slice(start, length)))

        def add(number, total):
            return tree.add(total, share(number * length, length))

        slices, rest = divmod(self.size, length)
        if rest:
            return jax.lax.fori_loop(0, slices, add, share(self.size - rest, rest))
        return jax.lax.fori_loop(1, slices, add, share(0, length))

    def _pass_length(self):
        """Return the number of samples in a slice of a pass over all samples."""
        if jax.default_backend() != "cpu":
            return PASS
        return min(CPU_PASS, max(self.batch, self.batch * CACHE // max(self.batch_bytes, 1)))

    def _slice(self, start, length):
        if length == self.size:
            return self.data
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, length), self.data)


def even_batch(size: int, batch: int) -> int:
    """Return the smallest batch size that divides the samples into as many batches as ``batch`` does.

    The batches are then nearly equal, so that no weight of a batch is far above 1. For 65 samples and a batch of 64,
    the result is 33.
    """
    return -(-size // -(-size // batch))


def draw(samples: Samples, sampling: Sampling, key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return the index of the batch for each of some draws.

    Args:
        samples: the batches.
        sampling: ``"with_replacement"``, or ``"without_replacement"`` for a new random order of the batches in each
            epoch.
        key: the sampler's key, of the implementation threefry2x32.
        numbers: for each draw, how many draws came before it in the run: integers of any shape.

    Returns:
        The indices of the batches, int32 of the shape of ``numbers``.
    """
    flat = numbers.ravel()
    if samples.batches == 1:
        return tree.match_varying_axes(jnp.zeros(numbers.shape, jnp.int32), jax.random.key_data(key))[0]
    one = _with_replacement if sampling == "with_replacement" else _without_replacement
    return jax.vmap(partial(one, samples, key))(flat).reshape(numbers.shape)


def _with_replacement(samples, key, number):
    # The remainder of a 32-bit number is uniform up to a relative error of (number of batches)/2³².
    words = jax.random.key_data(jax.random.fold_in(key, number))
    return (words[0] % jnp.uint32(samples.batches)).astype(jnp.int32)


def _without_replacement(samples, key, number):
    epoch, place = number // samples.batches, number % samples.batches
    return permuted(jax.random.fold_in(key, epoch), place, samples.batches)


def permuted(key: jax.Array, place: jax.Array, count: int) -> jax.Array:
    """Return the entry at ``place`` of a random permutation of 0 … count − 1, without making the permutation.

    A Feistel network permutes the numbers below a power of two. A result that is not below ``count`` is put into the
    network again, until the result is below ``count``. For a ``count`` of at most ``FEW``, the permutation is the order
    of ``count`` random numbers.

    Source: Black, Rogaway (2002), Ciphers with arbitrary finite domains.

    Example:
        >>> sorted(int(permuted(jax.random.key(0), place, 5)) for place in range(5))
        [0, 1, 2, 3, 4]
    """
    first, second = jax.random.key_data(key)
    place = jnp.asarray(place).astype(jnp.uint32)
    if count <= FEW:
        numbers = _mix(_mix(first + jnp.arange(count, dtype=jnp.uint32)) ^ second)
        ranks = jnp.sum(numbers[:, None] > numbers, axis=1, dtype=jnp.uint32)
        return jnp.argmax(ranks == place).astype(jnp.int32)
    low = (count - 1).bit_length() // 2
    high = (count - 1).bit_length() - low
    keys = _mix(first + jnp.arange(ROUNDS, dtype=jnp.uint32)) ^ second

    def one_round(number, key, left_bits, right_bits):
        """Mix the right bits into the left ones, and swap both."""
        right = number & _mask(right_bits)
        left = (number >> jnp.uint32(right_bits)) ^ (_mix(right ^ key) & _mask(left_bits))
        return (right << jnp.uint32(left_bits)) | left

    def two_rounds(pair, number):
        number = one_round(number, keys[2 * pair], high, low)
        return one_round(number, keys[2 * pair + 1], low, high)

    def encrypt(number: jax.Array) -> jax.Array:
        # A loop, not twelve rounds in a row, halves the time that the compiler takes.
        return jax.lax.fori_loop(0, ROUNDS // 2, two_rounds, number)

    keys, place = tree.match_varying_axes(keys, place)  # over several devices, each has keys of its own
    start = encrypt(place)
    return jax.lax.while_loop(lambda number: number >= count, encrypt, start).astype(jnp.int32)


def _mask(bits):
    return jnp.uint32((1 << bits) - 1)


def _mix(number):
    """Mix the bits of a 32-bit number (the finaliser of MurmurHash3)."""
    number = (number ^ (number >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    number = (number ^ (number >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return number ^ (number >> jnp.uint32(16))


def check_sampling(sampling: Any) -> None:
    """Raise ValueError for an unknown kind of sampling."""
    if sampling not in ("with_replacement", "without_replacement"):
        raise ValueError(f'sampling must be "with_replacement" or "without_replacement", got {sampling!r}')
