"""Each example runs in float32, as it does for a user, reaches its goal, and saves a picture."""

import importlib.util
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

pytest.importorskip("sklearn", reason="the data of the examples are part of scikit-learn")
EXAMPLES = Path(__file__).parents[2] / "examples"
# For each example, the condition on the numbers that its main() returns.
CHECKS = {
    "ridge_penalty": lambda theta, first, last, best: last <= best + 1e-3 < first,
    "feature_penalties": lambda first, last, real, noise: last < first and noise > real + 0.5,
    "hyper_cleaning": lambda noisy, learned, right, judged: learned > max(noisy + 0.1, right - 0.02) and judged > 0.9,
    "distillation": lambda first, last, accuracy: last < 0.5 * first and accuracy > 0.85,
    "equilibrium_model": lambda first, last, accuracy: last < 0.5 * first and accuracy > 0.9,
    "portfolio": lambda first, last, total: last < first and abs(total - 1) < 1e-5,
    "equinox_features": lambda first, last: last < 0.25 * first,
    "flax_sinusoids": lambda first, last: last < 0.75 * first,
    # Accuracies on classes of the same size. A difference of 5 % is more than two standard deviations on 500 images.
    "class_weights": lambda equal, inverse, learned: learned > max(equal + 0.05, inverse - 0.02),
    "learned_denoiser": lambda quadratic, variation, learned: learned < 0.9 * min(quadratic, variation),
    "stochastic_hyper_cleaning": lambda noisy, learned, right, judged: (
        learned > max(noisy + 0.015, right - 0.02) and judged > 0.9
    ),
    # Each argument holds the seconds and megabytes of a step, the validation loss, and the fraction of the weights that
    # are on the right side of 0.5.
    "network_reweighting": lambda soba, f2sa, implicit: all(
        10 * seconds < implicit[0] and 2 * size < implicit[1] and loss < 0.8 and judged > 0.9
        for seconds, size, loss, judged in (soba, f2sa)
    ),
    "text_mixture": lambda equal, learned, documentation, code, numbers, shuffled: (
        learned < equal - 0.03 and documentation > code > 0.1 > max(numbers, shuffled)
    ),
}
NEEDS = {
    "equinox_features": "equinox",
    "learned_denoiser": "equinox",
    "flax_sinusoids": "flax",
    "class_weights": "flax",
}
SHORTER = {
    "flax_sinusoids": {"steps": 200},
    "stochastic_hyper_cleaning": {"copies": 5, "steps": 3000},
    "network_reweighting": {"width": 128},
    "text_mixture": {"windows": 2048, "steps": 600},
}
"""Arguments for a shorter run than the one in the gallery. The check must still pass."""
LONGER = {"stochastic_hyper_cleaning": 90, "network_reweighting": 125, "text_mixture": 110}
"""Limits on the number of lines, which an example must stay below; the limit of the other examples is 60.

These examples are longer because they prepare their data or define a network.
"""


def test_every_example_is_checked_and_short():
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == set(CHECKS)
    assert all(len(path.read_text().splitlines()) < LONGER.get(name, 60) for name, path in files.items())


@pytest.mark.slow("runs an example to its end", fast="portfolio")
@pytest.mark.parametrize("name", CHECKS)
def test_the_example_reaches_its_goal(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"the example needs {NEEDS[name]}: pip install '.[{NEEDS[name]}]'")
    matplotlib.use("Agg")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = tmp_path / "picture.png"
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        out = module.main(picture, **SHORTER.get(name, {}))
    plt.close("all")
    assert CHECKS[name](*out), out
    assert picture.stat().st_size > 5000
