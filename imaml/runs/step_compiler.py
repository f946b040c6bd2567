"""Compilation of the meta-step on a background thread, while the main thread reads the data."""

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
    """Compiler of a preset's meta-step for the devices of ``mesh``.

    XLA compiles without Python's global lock, so the main thread can draw or decode images meanwhile. The compiling
    thread is not a daemon, so Python waits for it at a normal exit: the interpreter must not shut down while a thread
    is inside XLA. A command of ``imaml`` that failed or was stopped does not wait. It ends the process by ``os._exit``.

    Args:
        preset: the settings of the run.
        mesh: the devices that the program runs on.
        on_event: called with a message before each compilation.
    """

    def __init__(self, preset: Preset, mesh: Mesh, on_event: Callable[[str], None] = lambda message: None):
        self._preset, self._mesh, self._on_event = preset, mesh, on_event
        self._shapes: Any = None
        self._program: Future | None = None

    def begin(self, source: Any) -> None:
        """Trace the step for the shapes and dtypes of ``source``, and start to compile it on another thread.

        This does nothing if the last call was for the same shapes and dtypes.

        Args:
            source: a pytree of arrays, or of their shapes and dtypes, from which tasks are drawn.
        """
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
        """Return the compiled step for the shapes of ``source``, after waiting for its compilation.

        The compilation begins here if :meth:`begin` was not called for these shapes. The step's arguments must be
        replicated over the devices of the mesh.
        """
        self.begin(source)
        assert self._program is not None
        return self._program.result()

    def _shape(self, leaf):
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=everywhere(self._mesh))
