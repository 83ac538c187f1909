"""Open a file on onnxruntime, with casts to float32 where it has no kernel for the model's own dtype.

onnxruntime refuses such a file when it loads it, one operator at a time; each refused operator gets casts
around every node of its kind, until the file loads.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import onnx
import onnxruntime

from adapter_compiler.errors import VerificationError
from adapter_compiler.onnx.verify import open_session
from passes.cast_onnx import cast_operator

logger = logging.getLogger(__name__)

_REFUSED = re.compile(r"Could not find an implementation for (\w+)\(\d+\) node")


def open_with_casts(path: Path) -> tuple[onnxruntime.InferenceSession, tuple[str, ...]]:
    """Open a file; where kernels are missing, put casts into it and save it again.

    Returns:
        The session, and the operators that now run in float32.

    Raises:
        VerificationError: the file does not load for another reason.
    """
    cast: list[str] = []
    while True:
        try:
            return open_session(path), tuple(cast)
        except VerificationError as error:
            refused = _REFUSED.search(str(error))
            if refused is None or refused[1] in cast:
                raise
            model = onnx.load(path, load_external_data=False)
            if not cast_operator(model, refused[1]):
                raise
            logger.info("onnxruntime lacks %s for this dtype; it runs in float32", refused[1])
            onnx.save(model, path)
            cast.append(refused[1])
