"""The meta-step as a compiled program, which a thread of its own makes while the data are read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imaml.parallel.devices import everywhere
from imaml.runs.meta_step import initial_state, meta_step
from imaml.settings.preset import Preset


class StepCompiler:
    """Compiles a preset's meta-step on ``mesh``, at the latest when it is asked for.

    XLA needs no interpreter, so that drawing or decoding goes on beside it. The interpreter's end waits for the
    thread, since to end it within XLA is not safe; a command that failed or was stopped does not.
    """

    def __init__(self, preset: Preset, mesh: Mesh, on_event: Callable[[str], None] = lambda message: None):
        self._preset, self._mesh, self._on_event = preset, mesh, on_event
        self._shapes: Any = None
        self._program: Future | None = None

    def begin(self, source: Any) -> None:
        """Trace the step for a source of these shapes, and let it be compiled; once for each."""
        shapes = jax.tree.map(self._shape, source)
        if self._program is not None and shapes == self._shapes:
            return
        self._on_event("compiling the meta-step")
        state = jax.tree.map(self._shape, jax.eval_shape(lambda: initial_state(self._preset)))
        step = jax.jit(meta_step(self._preset, self._mesh), out_shardings=everywhere(self._mesh))
        lowered = step.lower(state, shapes)
        thread = ThreadPoolExecutor(1)
        self._shapes, self._program = shapes, thread.submit(lowered.compile)
        thread.shutdown(wait=False)

    def step(self, source: Any) -> Callable:
        """The compiled step for a source of these shapes; arguments lie on every device of the mesh."""
        self.begin(source)
        assert self._program is not None
        return self._program.result()

    def _shape(self, leaf):
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=everywhere(self._mesh))
