"""Runs a test's TPU kernels on the CPU, and fails where two accesses race."""

import contextlib
import importlib.util

import jax
import pytest

# Older ones lack parts of what the kernels use.
needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the TPU kernels need jax 0.11"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu's compiler is not installed"
)


@contextlib.contextmanager
def interpreted():
    """Kernels inside are interpreted; memory that nobody wrote holds NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # knows the races
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not interpret_pallas_call.races.races_found
