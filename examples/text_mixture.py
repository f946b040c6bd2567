"""A mixture of text sources for a small language model, learned so that the model predicts another text.

The sources are Python's help topics, five modules of its standard library, a table of numbers, and shuffled
characters. The inner problem trains a causal convolution on the weighted sources. θ holds the logits of the four
weights. The outer value is the loss on scikit-learn's descriptions of datasets. MASOBA moves the model, the adjoint and
θ at once.
"""

import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

import bilevel as bl

WINDOW, TAPS, CHARACTERS = 16, 5, 96


def load(windows):
    """Return the names of the sources, windows with the index of their source, and validation and test windows."""
    data, library = Path(sklearn.datasets.__file__).parent, Path(sysconfig.get_path("stdlib"))
    join = lambda paths: "\n".join(path.read_text(encoding="utf-8") for path in paths)  # noqa: E731
    documentation, rng = "\n".join(pydoc_data.topics.topics.values()), np.random.default_rng(0)
    sources = {
        "documentation": documentation,
        "code": join(library / f"{name}.py" for name in ("argparse", "ast", "difflib", "inspect", "typing")),
        "numbers": (data / "data" / "breast_cancer.csv").read_text(encoding="utf-8"),
        "shuffled characters": "".join(rng.permutation(list(documentation[:200_000]))),
    }

    def cut(text, count):
        codes = np.frombuffer(text.replace("\n", "\x7f").encode("ascii", "ignore"), np.uint8)
        codes = codes[codes >= 32] - 32  # the printable characters, and 95 for the end of a line
        places = rng.integers(0, len(codes) - WINDOW, count)
        return jnp.asarray(codes[places[:, None] + np.arange(WINDOW + 1)])

    text = jnp.concatenate([cut(source, windows) for source in sources.values()])
    inner = {"text": text, "source": jnp.repeat(jnp.arange(len(sources)), windows)}
    target = join(sorted((data / "descr").glob("*.rst")))
    valid, test = cut(target[: len(target) // 2], 2048), cut(target[len(target) // 2 :], 2048)
    return list(sources), bl.stochastic.shuffle(inner, jax.random.key(0)), valid, test


def model():
    draw = lambda key, *shape: jax.random.normal(key, shape) / 3  # noqa: E731
    first, second, third = jax.random.split(jax.random.key(1), 3)
    return {
        "embed": draw(first, CHARACTERS, 16),
        "filter": draw(second, TAPS, 16, 96) / 3,
        "out": draw(third, 96, CHARACTERS) / 10,
    }


def losses(w, text):
    embedded = jnp.pad(jax.nn.one_hot(text[:, :-1], CHARACTERS) @ w["embed"], ((0, 0), (TAPS - 1, 0), (0, 0)))
    hidden = jnp.tanh(sum(embedded[:, tap : tap + WINDOW] @ w["filter"][tap] for tap in range(TAPS)))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(hidden @ w["out"], text[:, 1:]), axis=1)


def fit(w, theta, batch):
    weights = len(theta) * jax.nn.softmax(theta)[batch["source"]]  # all sources have equally many windows
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
    return jnp.mean(weights * losses(w, batch["text"])) + 5e-5 * penalty


def main(picture="text_mixture.png", windows=16_384, steps=2000):
    names, inner, valid, test = load(windows)
    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, text: jnp.mean(losses(w, text)))
    evaluate = lambda theta, w: (jnp.mean(losses(w, test)), jax.nn.softmax(theta))  # noqa: E731

    def run(outer_rate):
        masoba = bl.stochastic.MASOBA(1.0, 0.3, outer_rate, inner_batch=32, outer_batch=32)
        start = jnp.zeros(len(names)), model()
        found = bl.stochastic.minimize(
            problem, *start, inner, valid, masoba, steps, evaluate=evaluate, evaluate_every=steps // 20
        )
        return found.history.step, *found.history.evaluations

    (step, uniform, _), (_, learned, weights) = run(0.0), run(0.1)
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(step, weights, label=names)
    left.set(xlabel="step", ylabel="weight of a source", ylim=(0, 1))
    left.legend()
    right.plot(step, uniform, label="equal weights")
    right.plot(step, learned, label="learned weights")
    right.set(xlabel="step", ylabel="test loss per character, nats")
    right.legend()
    plt.savefig(picture, dpi=120)
    return float(uniform[-1]), float(learned[-1]), *map(float, weights[-1])


if __name__ == "__main__":
    print(
        "test loss: equal weights {:.3f}, learned weights {:.3f}; weights: documentation {:.3f}, code {:.3f}, "
        "numbers {:.3f}, shuffled characters {:.3f}".format(*main(*sys.argv[1:]))
    )
