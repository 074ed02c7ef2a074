"""How far an implementation may be from what it is compared with: the one table of this folder.

Differences are relative to the largest magnitude of the expected values of one row, so that a row's
error is measured against what its sums were made of. Matmuls accumulate in float32 everywhere;
what remains is the rounding of inputs, of the LoRA intermediate and of the output to the dtype:
half a unit in the last place is 2^-9 of a value in bfloat16, 2^-12 in float16.
"""

import numpy as np

RELATIVE = {
    # Both accumulate in float32, in different orders.
    "float32": 4e-6,
    # Two roundings (the intermediate, the output), each 2^-9, and headroom of 2.
    "bfloat16": 1.6e-2,
    "float16": 2e-3,
}


def assert_close(actual, expected, dtype, what=""):
    """Rows of ``actual`` and ``expected`` agree to the dtype's tolerance; NaN agrees with
    nothing."""
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape, what
    if not actual.size:
        return
    rows = actual.shape[0]
    size = np.abs(expected).reshape(rows, -1).max(axis=1)
    error = np.abs(actual - expected).reshape(rows, -1)
    assert np.isfinite(error).all(), (
        f"{what}: not finite in rows {np.argwhere(~np.isfinite(error).all(axis=1)).ravel()}"
    )
    worst = error.max(axis=1) / np.maximum(size, 1e-30)
    assert worst.max() <= RELATIVE[np.dtype(dtype).name], (
        f"{what}: row {worst.argmax()} is off by {worst.max():.2e} of its largest value"
    )
