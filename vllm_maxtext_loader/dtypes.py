"""The dtypes a MaxText checkpoint's weights have, under the names of each neighbour.

numpy has no bfloat16 of its own; ml_dtypes gives it one, which travels to torch and files as its bits.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

FLOATS: dict[str, np.dtype] = {dtype.name: dtype for dtype in (BFLOAT16, FLOAT16, FLOAT32)}
"""By numpy's name, which is also torch's and TensorStore's; coarsest first."""

SAFETENSORS: dict[str, np.dtype] = {"BF16": BFLOAT16, "F16": FLOAT16, "F32": FLOAT32}
"""By safetensors' name."""
