"""Fixtures of a tiny training run, shared by the tests in this folder."""

import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny_run`

import tiny_run


@pytest.fixture(scope="module")
def traces(tiny_pixels):
    """A list with one preset for each trace of a meta-step so far.

    While the fixture is in use, every dataset is the tiny one, and the meta-step and the evaluation are cached; see
    ``tiny_run.patched``.
    """
    with tiny_run.patched(tiny_pixels, tiny_run.shared_meta_step):
        yield tiny_run.shared_traces


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, tiny_pixels):
    """An uninterrupted tiny run, its progress and events, and how often its meta-step was traced and compiled."""
    traced, progress, events, messages = [], [], [], []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    try:
        with tiny_run.patched(tiny_pixels, tiny_run.counted_meta_step(traced)), jax.log_compiles():
            directory = tmp_path_factory.mktemp("uninterrupted")
            run = tiny_run.train(directory, on_progress=progress.append, on_event=events.append)
    finally:
        logging.getLogger("jax").removeHandler(handler)
    compiled = [message for message in messages if re.match(r"Compiling (jit\()?meta_step_of_test", message)]
    return SimpleNamespace(run=run, progress=progress, events=events, traces=len(traced), compilations=len(compiled))
