"""Tests of a trained learner: it adapts by gradient descent, and predicts for an image alone as in a batch."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_preset import TinyMLP
from tiny_run import dataset

import bilevel as bl
import imaml
from imaml import InputError
from imaml.learning import networks
from imaml.learning.algorithms import Learner
from imaml.learning.tasks import Episode
from imaml.runs import evaluation
from imaml.runs.learner import CHUNK
from imaml.settings.parts import Conv4, Rotations

pytestmark = pytest.mark.usefixtures("quick_compilation")

PRESET = replace(
    imaml.preset("glyphs-5way-1shot-gd"),
    network=Conv4(filters=2),
    episode=Episode(ways=3, shots=2, queries=2),
    inner=bl.GradientDescent(0.1, 3),
)
"""The default preset with three ways, a small network and three inner steps."""


@pytest.fixture(scope="module")
def learner():
    """A learner with untrained parameters of the small preset. The tests of this file share what it compiles."""
    return untrained(PRESET)


def untrained(preset):
    """Return a learner with untrained parameters."""
    return imaml.TrainedLearner(preset.functions.init(jax.random.key(3)), preset)


@pytest.fixture(scope="module")
def sinusoid():
    """A learner with untrained parameters of the sinusoid preset."""
    return untrained(imaml.preset("sinusoid-5shot-gd"))


@pytest.fixture
def task(tiny_pixels):
    """Two support images of each of three classes, their labels, and 40 query images, which are more than CHUNK."""
    support = tiny_pixels[:3, :2].reshape(6, 28, 28, 1)
    query = np.random.default_rng(1).permutation(tiny_pixels.reshape(-1, 28, 28, 1))[:40]
    return support, np.repeat(["ba", "da", "fa"], 2), query


# --- Numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow("compiles the adaptation in float64 twice")
def test_adaptation_and_probabilities_are_those_of_gradient_descent_written_out_in_float64(task, x64):
    # Classes of three, two and one image: the number of images need not be that of the preset.
    support, labels, query = task[0], np.array([0, 0, 0, 1, 1, 2]), task[2][:5]
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PRESET.functions.init(jax.random.key(3)))
    adapted = imaml.TrainedLearner(theta, PRESET).adapt(support, labels)
    network = networks.conv4(3, filters=2, kernel_gain=PRESET.network.kernel_gain)
    x, z = (jnp.asarray(images.astype(np.float32) / np.float32(255), jnp.float64) for images in (support, query))

    def objective(phi):
        logits = network.apply(phi, x)
        losses = jax.scipy.special.logsumexp(logits, axis=-1) - logits[jnp.arange(6), labels]
        distance = sum(jnp.sum((p - t) ** 2) for p, t in zip(*map(jax.tree.leaves, (phi, theta)), strict=True))
        return losses.mean() + 0.5 * PRESET.strength * distance

    phi, slope = theta, jax.jit(jax.grad(objective))
    for _ in range(3):
        phi = jax.tree.map(lambda w, s: w - 0.1 * s, phi, slope(phi))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), adapted.solution.w, phi)
    by_support = jax.nn.softmax(network.apply_with_support_statistics(phi, z, x))
    by_query = jax.nn.softmax(network.apply(phi, z))
    np.testing.assert_allclose(adapted.probabilities(query), by_support, rtol=1e-10)
    np.testing.assert_allclose(adapted.probabilities(query, transductive=True), by_query, rtol=1e-10)
    assert abs(by_support - by_query).max() > 1e-3  # the two normalisations differ


@pytest.mark.slow("compiles predictions of several shapes")
def test_an_image_alone_has_the_probabilities_that_it_has_among_others_to_the_bit(learner, task):
    support, labels, query = task
    adapted = learner.adapt(support, labels)
    together = adapted.probabilities(query)
    alone = np.concatenate([adapted.probabilities(image[None]) for image in query])
    np.testing.assert_array_equal(together, alone)
    assert len(query) > CHUNK and adapted.predict(query).tolist() == labels[::2][together.argmax(-1)].tolist()
    np.testing.assert_allclose(together.sum(-1), 1, rtol=1e-6)
    # With transductive=True, as in the published results, the probabilities of an image depend on the other images.
    published = adapted.probabilities(query, transductive=True)
    changed = adapted.probabilities(np.concatenate([query[:1], 255 - query[1:]]), transductive=True)
    assert abs(published[0] - changed[0]).max() > 1e-3


@pytest.mark.slow("compiles an evaluation")
def test_both_normalisations_agree_with_the_evaluation_of_the_same_tasks(learner, tiny_pixels):
    preset = replace(PRESET, rotations=Rotations(test=True))
    learner, classes = imaml.TrainedLearner(learner.theta, preset), dataset(tiny_pixels).test
    found = evaluation.evaluate_classes(learner.theta, preset, classes, 50, part="validation")
    published, support = found.each
    assert all(line.startswith("validation accuracy ") for line in str(found).splitlines())
    drawn = preset.episode.batch(jnp.asarray(classes.pixels), jax.random.split(preset.keys.test, 50), rotate=True)
    adapted = learner.adapt_tasks(drawn.support_x, drawn.support_y)
    for transductive, expected in ((True, published), (False, support)):
        predicted = np.stack(adapted.predict(drawn.query_x, transductive))
        scores = (predicted == drawn.query_y).mean(-1)
        assert scores.mean() == pytest.approx(expected.value, abs=1e-6)
        assert 1.96 * scores.std(ddof=1) / 50**0.5 == pytest.approx(expected.interval, rel=1e-5)
    assert published.interval != support.interval


def test_a_regression_predicts_as_gradient_descent_does(sinusoid):
    x, y, new = np.array([-2.0, -1.0, 0.0, 1.0, 3.0]), np.array([0.5, 1.0, 0.0, -1.0, 2.0]), np.linspace(-5, 5, 7)
    preset, adapted = sinusoid.preset, sinusoid.adapt(x, y)
    apply, phi, speed = preset.functions.apply, sinusoid.theta, None

    @jax.jit
    def slope(phi):
        loss = jax.grad(lambda w: jnp.mean((apply(w, x[:, None]) - y[:, None]) ** 2))(phi)
        return jax.tree.map(lambda s, w, t: s + preset.strength * (w - t), loss, phi, sinusoid.theta)

    for _ in range(preset.inner.max_steps):
        step = slope(phi)
        speed = step if speed is None else jax.tree.map(lambda v, s: preset.inner.momentum * v + s, speed, step)
        phi = jax.tree.map(lambda w, v: w - preset.inner.step_size * v, phi, speed)
    found = adapted.predict(new)
    assert found.shape == (7,) and adapted.labels is None
    np.testing.assert_allclose(found, apply(phi, new[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    column = sinusoid.adapt(x[:, None], y[:, None]).predict(new[:, None])
    np.testing.assert_array_equal(column, found[:, None])
    with pytest.raises(InputError, match="sinusoid-5shot-gd is a regression"):
        adapted.probabilities(new)


# --- Many tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.slow("adapts a thousand tasks")
def test_a_thousand_tasks_are_adapted_by_one_program_that_is_traced_once(sinusoid, monkeypatch):
    traces, adapt = [], Learner.adapt
    monkeypatch.setattr(Learner, "adapt", lambda *arguments: traces.append(1) or adapt(*arguments))
    preset = replace(sinusoid.preset, outer=replace(sinusoid.preset.outer, at_once=10))  # adapts 10 tasks at a time
    learner = imaml.TrainedLearner(sinusoid.theta, preset)
    random = np.random.default_rng(0)
    x, y, new = (random.uniform(-2, 2, (1000, points)) for points in (5, 5, 3))
    first = learner.adapt_tasks(x, y).predict(new)
    second = learner.adapt_tasks(x[::-1], y[::-1]).predict(new[::-1])
    assert len(traces) == 1 and first.shape == (1000, 3)
    np.testing.assert_allclose(second[::-1], first, rtol=1e-4, atol=1e-5)
    alone = np.stack([learner.adapt(x[i], y[i]).predict(new[i]) for i in range(0, 1000, 199)])
    np.testing.assert_allclose(first[::199], alone, rtol=1e-4, atol=1e-5)
    assert len(traces) == 2  # one more for all tasks that were adapted alone


def test_every_task_has_labels_of_its_own(learner, task, tiny_pixels):
    support, _, query = task
    other = tiny_pixels[3:6, :2].reshape(6, 28, 28, 1)
    names = [["a", "a", "b", "b", "c", "c"], [(2, 1), (2, 1), (2, 0), (2, 0), (2, 2), (2, 2)]]
    adapted = learner.adapt_tasks(np.stack([support, other]), names)
    assert adapted.labels == [["a", "b", "c"], [(2, 0), (2, 1), (2, 2)]]
    found, shares = (ask(np.stack([query[:5], query[5:10]])) for ask in (adapted.predict, adapted.probabilities))
    assert shares.shape == (2, 5, 3)
    for index, (images, labels) in enumerate(((support, names[0]), (other, names[1]))):
        alone = learner.adapt(images, labels)
        expected = query[5 * index : 5 * index + 5]
        np.testing.assert_allclose(alone.probabilities(expected), shares[index], rtol=1e-4, atol=1e-6)
        assert alone.predict(expected) == found[index]


# --- Images and labels ---------------------------------------------------------------------------------------------


def test_images_are_read_alike_in_every_accepted_shape_and_dtype(learner, task):
    support, labels, query = task
    expected = learner.adapt(support, labels).probabilities(query[:3])
    scaled = query[:3].astype(np.float32) / np.float32(255)
    for images in (query[:3, ..., 0], scaled, scaled[..., 0].astype(np.float64), jnp.asarray(query[:3]), list(scaled)):
        np.testing.assert_array_equal(learner.adapt(support[..., 0], labels).probabilities(images), expected)
    binary = query[:3] > 128
    adapted = learner.adapt(support, labels)
    np.testing.assert_array_equal(adapted.probabilities(binary), adapted.probabilities(binary * np.uint8(255)))


def test_a_preset_with_bright_paper_gets_reversed_images(task):
    support, labels, query = task
    small, bright = (
        untrained(replace(PRESET, network=TinyMLP(), episode=replace(PRESET.episode, bright_paper=paper)))
        for paper in (False, True)
    )
    expected = small.adapt(support, labels).probabilities(query)
    for ink, white in ((np.uint8(255), support), (1.0, support / 255)):
        found = bright.adapt(ink - white, labels).probabilities(255 - query)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "names", [("z", "a", "m"), (3, 1, 2), (Fraction(1, 3), 2, 0.5), (("x", 1), "x", None), (frozenset("ab"), "a", 1)]
)
def test_labels_of_any_hashable_type_are_returned_as_given(names, learner, task):
    support, _, query = task
    labels = [name for name in names for _ in range(2)]
    adapted = learner.adapt(support, labels)
    chosen = adapted.probabilities(query).argmax(-1)
    assert set(adapted.labels) == set(names)
    assert adapted.predict(query) == [adapted.labels[index] for index in chosen] and len(set(chosen)) > 1
    assert all(any(label is name for name in names) for label in adapted.predict(query))


@pytest.mark.parametrize("dtype", [np.int16, "<U2", bool])
def test_an_array_of_labels_gives_an_array_of_labels(dtype, task):
    support, _, query = task
    small = untrained(replace(PRESET, network=TinyMLP(), episode=Episode(ways=2, shots=2, queries=2)))
    found = small.adapt(support[:4], np.array([1, 1, 0, 0]).astype(dtype)).predict(query)
    assert found.dtype == np.dtype(dtype) and found.shape == (40,)


def test_with_sortable_labels_the_probabilities_do_not_depend_on_the_order_of_the_examples(learner, task):
    support, labels, query = task
    expected = learner.adapt(support, list(labels)).probabilities(query)
    order = [5, 0, 3, 1, 4, 2]
    np.testing.assert_allclose(
        learner.adapt(support[order], list(labels[order])).probabilities(query), expected, atol=1e-5
    )


# --- Mistakes ------------------------------------------------------------------------------------------------------

X, Y = np.zeros((6, 28, 28), np.uint8), ["a", "a", "b", "b", "c", "c"]


@pytest.mark.parametrize(
    "x, y, message",
    [
        (X[:4], Y[:4], "2 classes ('a', 'b'), but glyphs-5way-1shot-gd was trained to tell 3 apart: give examples"),
        (X, list("abcdef"), "6 classes ('a', 'b', 'c', 'd', 'e', …), but glyphs-5way-1shot-gd was trained to tell 3"),
        (X, list("abcdef"), "or train with --episode.ways 6"),
        (X, Y[:5], "support_x has 6 examples, but support_y has 5 labels: pass one label for each"),
        (X, [["a"], *Y[1:]], "a label that is not hashable"),
        (X, np.eye(3)[[0, 0, 1, 1, 2, 2]], "must have one label for each image, got the shape (6, 3)"),
        (X.astype(np.float32) + 255, Y, "floats in [0, 1], got floats from 255 to 255: divide by 255"),
        (X - np.float32(0.5), Y, "got floats from -0.5 to -0.5"),
        (X * np.nan, Y, "got floats from nan to nan"),
        (X.astype(int), Y, "got int64: convert with .astype(numpy.uint8)"),
        (X[0], Y, "got (28, 28): one image needs a leading axis, image[None]"),
        (X[:, :20], Y, "[images, 28, 28, 1], got (6, 20, 28, 1): resize the images to 28×28"),
        (np.zeros((6, 28, 28, 3), np.uint8), Y, "got (6, 28, 28, 3): convert the images to grey"),
        (X[:, None], Y, "move the axis of channels to the end, numpy.moveaxis(images, -3, -1)"),
        ([X[0], X[1, :20]], Y[:2], "its parts have different shapes"),
        (X[:0], [], "support_x is empty"),
        (["a.png"], Y, "must have the shape"),
        ([None], Y, "must be an array of numbers"),
    ],
)  # fmt: skip
def test_a_support_set_that_cannot_be_used_is_refused_with_a_remedy(x, y, message, learner):
    with pytest.raises(InputError) as refused:
        learner.adapt(x, y)
    assert message in str(refused.value)


def test_queries_and_tasks_that_do_not_fit_are_refused(learner, sinusoid, task):
    adapted = learner.adapt(task[0], task[1])
    with pytest.raises(InputError, match="x must have the shape"):
        adapted.predict(task[2][0])
    with pytest.raises(InputError, match="x is empty"):
        adapted.predict(task[2][:0])
    many = sinusoid.adapt_tasks(np.ones((4, 5)), np.ones((4, 5)))
    with pytest.raises(InputError, match="x has examples of 3 tasks, but θ was adapted to 4: pass 4"):
        many.predict(np.ones((3, 2)))
    with pytest.raises(InputError, match="support_y must have 2 axes, the last of length 1; got the shape"):
        sinusoid.adapt(np.ones(5), np.ones((5, 2)))
    with pytest.raises(InputError, match="support_x has numbers that are not finite"):
        sinusoid.adapt([1, np.inf], [1, 2])
    with pytest.raises(InputError, match="support_y of task 1 has 2 classes"):
        learner.adapt_tasks(np.stack([X, X]), [Y, [*Y[:4], "b", "b"]])
    with pytest.raises(InputError, match="all tasks must have the same number of labels"):
        learner.adapt_tasks(np.stack([X, X]), [Y, [*Y, "c"]])


def test_an_adaptation_that_diverges_is_an_error_and_no_label(sinusoid):
    preset = replace(sinusoid.preset, inner=bl.GradientDescent(1e30, 4))
    learner = imaml.TrainedLearner(sinusoid.theta, preset)
    with pytest.raises(InputError, match="the adapted parameters are not finite: the inner steps diverge"):
        learner.adapt([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(InputError, match="of 3 tasks, the first of which is task 0, are not finite"):
        learner.adapt_tasks(np.ones((3, 2)), np.ones((3, 2)))
