"""Tests of sampling tasks.

Every test image encodes its class, its number in the class and its orientation, so that a test can read from a task
which images were drawn and how they were rotated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaml.datasets import sinusoid
from imaml.datasets.images import ImageClasses
from imaml.errors import InputError
from imaml.learning.tasks import Curve, Episode, Task

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES, SAMPLES, TASKS = 12, 6, 40
EPISODE = Episode(ways=3, shots=2, queries=1)
CORNERS = [
    (0, 0),
    (-1, 0),
    (-1, -1),
    (0, -1),
]  # positions of the first corner after 0, 1, 2 and 3 quarter turns counter-clockwise


def marked_pixels():
    """Return images with one white corner, and a centre of grey level 6 · class + sample + 1 that no rotation moves."""
    pixels = np.zeros((CLASSES, SAMPLES, 28, 28, 1), np.uint8)
    pixels[:, :, 13:15, 13:15, 0] = np.arange(1, CLASSES * SAMPLES + 1).reshape(CLASSES, SAMPLES, 1, 1)
    pixels[:, :, 0, 0] = 255
    return pixels


def identities(images):
    """Return the class and the sample number of each image in ``[..., 28, 28, 1]``."""
    numbers = np.rint(np.asarray(images)[..., 13, 13, 0] * 255).astype(int) - 1
    return numbers // SAMPLES, numbers % SAMPLES


def quarter_turns(images):
    """Return by how many quarter turns each image was rotated."""
    corners = np.stack([np.asarray(images)[..., row, column, 0] for row, column in CORNERS], -1)
    assert (corners.sum(-1) == 1).all()
    return corners.argmax(-1)


def draw(rotate):
    keys = jax.random.split(jax.random.key(0), TASKS)
    return jax.jit(lambda pixels, keys: EPISODE.batch(pixels, keys, rotate))(marked_pixels(), keys)


@pytest.fixture(scope="module")
def drawn():
    return draw(rotate=False)


@pytest.fixture(scope="module")
def rotated():
    return draw(rotate=True)


@pytest.fixture(scope="module", params=["drawn", "rotated"])
def batch(request):
    return request.getfixturevalue(request.param)


def test_the_classes_of_a_task_are_distinct_and_every_class_is_drawn(batch):
    classes = identities(batch.support_x)[0][:, :: EPISODE.shots]
    assert all(len(set(row)) == EPISODE.ways for row in classes)
    # A class is in a task with probability 1/4, so 40 tasks all miss it with probability 1e-5.
    assert set(classes.ravel()) == set(range(CLASSES))


def test_a_label_means_the_same_class_in_support_and_query(batch):
    np.testing.assert_array_equal(batch.support_y, np.tile([0, 0, 1, 1, 2, 2], (TASKS, 1)))
    np.testing.assert_array_equal(batch.query_y, np.tile([0, 1, 2], (TASKS, 1)))
    assert batch.support_y.dtype == batch.query_y.dtype == jnp.int32
    support, query = identities(batch.support_x)[0], identities(batch.query_x)[0]
    np.testing.assert_array_equal(support, np.repeat(query, EPISODE.shots, axis=1))


def test_support_and_query_are_different_images(batch):
    samples = np.concatenate(
        [
            identities(batch.support_x)[1].reshape(TASKS, EPISODE.ways, -1),
            identities(batch.query_x)[1].reshape(TASKS, EPISODE.ways, -1),
        ],
        axis=-1,
    )
    assert all(len(set(images)) == EPISODE.shots + EPISODE.queries for task in samples for images in task)
    assert set(samples.ravel()) == set(range(SAMPLES))


def test_images_are_float32_between_zero_and_one(batch):
    assert batch.support_x.shape == (TASKS, EPISODE.ways * EPISODE.shots, 28, 28, 1)
    assert batch.support_x.dtype == batch.query_x.dtype == jnp.float32
    assert float(batch.support_x.min()) == 0.0 and float(batch.support_x.max()) == 1.0


def test_a_task_is_a_function_of_its_key(drawn):
    key = jax.random.split(jax.random.key(0), TASKS)[7]
    again = jax.jit(lambda pixels, key: EPISODE.sample(pixels, key))(marked_pixels(), key)
    jax.tree.map(lambda one, many: np.testing.assert_array_equal(one, many[7]), again, drawn)
    assert not np.array_equal(drawn.query_x[7], drawn.query_x[8])


def test_without_rotation_no_image_is_rotated(drawn):
    assert not quarter_turns(drawn.support_x).any() and not quarter_turns(drawn.query_x).any()


def test_all_images_of_a_class_are_rotated_alike_and_all_four_angles_occur(rotated):
    support, query = quarter_turns(rotated.support_x), quarter_turns(rotated.query_x)
    np.testing.assert_array_equal(support, np.repeat(query, EPISODE.shots, axis=1))
    # Each angle is expected for a quarter of the 3 classes of 40 tasks. The tolerance is five standard deviations.
    counts = np.bincount(query.ravel(), minlength=4)
    assert np.abs(counts - 30).max() < 5 * np.sqrt(120 * 3 / 16)
    assert any(len(set(task)) > 1 for task in query)  # the classes of a task are rotated independently


def test_rotation_does_not_change_which_images_are_drawn(drawn, rotated):
    np.testing.assert_array_equal(identities(drawn.support_x), identities(rotated.support_x))


def test_bright_paper_inverts_the_images(drawn):
    key = jax.random.split(jax.random.key(0), TASKS)[0]
    bright = Episode(3, 2, 1, bright_paper=True).sample(marked_pixels(), key)
    # The images may differ in the last bit, because a compiled program may divide by 255 in another way.
    np.testing.assert_allclose(bright.query_x, 1 - drawn.query_x[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ways, shots, queries", [(1, 1, 1), (2, 0, 1), (2, 1, 0), (-5, 1, 1)])
def test_too_small_counts_are_refused_with_the_numbers(ways, shots, queries):
    with pytest.raises(InputError, match=f"got {ways} ways, {shots} shots and {queries} queries"):
        Episode(ways, shots, queries)


def classes():
    return ImageClasses(marked_pixels(), tuple(map(str, range(CLASSES))))


def test_more_ways_than_classes_are_refused_with_the_numbers():
    with pytest.raises(InputError, match="13 ways are more than the 12 classes of marks"):
        Episode(13, 1, 1).check(classes(), "marks")


def test_more_images_than_a_class_has_are_refused_with_the_numbers():
    with pytest.raises(InputError, match="4 shots and 3 queries are more than the 6 images that a class of marks has"):
        Episode(2, 4, 3).check(classes(), "marks")


counts = st.integers(-1, 8)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ways=st.integers(-1, 14), shots=counts, queries=counts)
def test_any_counts_are_either_refused_or_give_a_task_of_that_shape(ways, shots, queries):
    possible = 2 <= ways <= CLASSES and shots >= 1 and queries >= 1 and shots + queries <= SAMPLES
    try:
        episode = Episode(ways, shots, queries)
        episode.check(classes(), "marks")
    except InputError:
        assert not possible
        return
    assert possible
    task = jax.eval_shape(lambda pixels, key: episode.sample(pixels, key, True), marked_pixels(), jax.random.key(0))
    shapes = Task((ways * shots, 28, 28, 1), (ways * shots,), (ways * queries, 28, 28, 1), (ways * queries,))
    assert [leaf.shape for leaf in jax.tree.leaves(task)] == [
        shapes.support_x, shapes.support_y, shapes.query_x, shapes.query_y
    ]  # fmt: skip


# --- Sinusoids -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curves():
    return jax.jit(lambda keys: Curve(shots=5, queries=20).batch((), keys))(jax.random.split(jax.random.key(0), 400))


def test_the_points_of_a_task_lie_on_one_sinusoid_with_parameters_in_the_documented_ranges(curves):
    x, y = (np.concatenate([a, b], 1)[..., 0] for a, b in ((curves.support_x, curves.query_x),
                                                           (curves.support_y, curves.query_y)))  # fmt: skip
    assert x.shape == y.shape == (400, 25) and x.dtype == np.float32
    amplitudes, phases = [], []
    for points, values in zip(x.astype(float), y.astype(float), strict=True):  # a sin(x − b) = p sin x + q cos x
        basis = np.stack([np.sin(points), np.cos(points)], 1)
        (p, q), residual, *_ = np.linalg.lstsq(basis, values, rcond=None)
        assert residual[0] < 25 * (5 * 1e-6) ** 2 * 10
        amplitudes.append(np.hypot(p, q)), phases.append(np.arctan2(-q, p) % (2 * np.pi))
    # The probability that none of 400 uniform numbers lies within 3 % of an end is 0.97⁴⁰⁰ = 5e-6.
    for sampled, (low, high) in ((amplitudes, sinusoid.AMPLITUDES), (phases, sinusoid.PHASES), (x, sinusoid.INPUTS)):
        assert low - 1e-3 <= np.min(sampled) < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < np.max(sampled) <= high + 1e-3


def test_a_curve_is_a_function_of_its_key(curves):
    again = Curve(shots=5, queries=20).sample((), jax.random.split(jax.random.key(0), 400)[7])
    np.testing.assert_allclose(again.query_y, curves.query_y[7], atol=1e-5)
    assert np.abs(curves.query_y[7] - curves.query_y[8]).max() > 0.1


def test_sinusoids_have_a_fingerprint_and_take_no_data_folder():
    assert sinusoid.load().fingerprint() == sinusoid.load().fingerprint()
    with pytest.raises(InputError, match="takes no data folder"):
        sinusoid.load("somewhere")


@pytest.mark.parametrize("shots, queries", [(0, 1), (1, 0)])
def test_a_curve_without_points_is_refused(shots, queries):
    with pytest.raises(InputError, match=f"got {shots} and {queries}"):
        Curve(shots, queries)
