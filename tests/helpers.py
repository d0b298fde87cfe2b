"""What the tests share: one assertion on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff import Tensor, backend


def assert_close(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Fail unless two arrays have one shape, one dtype, and max |actual − expected| <= atol + rtol max |expected|.

    actual: an array of any device, or a Tensor. The error is measured against the largest element and not element by
    element: a sum of large terms that nearly cancel is no more exact than the terms. NaN and infinity always fail.
    """
    actual = backend.to_numpy(actual.data if isinstance(actual, Tensor) else actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    if not actual.size:
        return
    wide = np.result_type(actual.dtype, np.float64)
    error = np.abs(actual.astype(wide) - expected.astype(wide))
    worst = np.unravel_index(np.argmax(error), error.shape)  # argmax counts NaN as the largest
    bound = atol + rtol * float(np.abs(expected.astype(wide)).max())
    assert error[worst] <= bound, (
        f"largest error {error[worst]:.3g} > {bound:.3g}, at {tuple(map(int, worst))}: "
        f"{actual[worst]!r}, expected {expected[worst]!r}"
    )
