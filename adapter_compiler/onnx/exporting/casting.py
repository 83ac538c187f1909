"""Open a file on onnxruntime, with casts to float32 where it has no kernel for the model's dtype.

onnxruntime refuses to load a file with operators that it has no kernel for, and names one of them. Casts are added
around every node of that operator, until the file loads.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import onnx
import onnxruntime

from adapter_compiler.errors import VerificationError
from adapter_compiler.onnx.verification.verify import open_session
from passes.export.cast_onnx import cast_operator, find_composite_operators

logger = logging.getLogger(__name__)

_REFUSED = re.compile(r"Could not find an implementation for (\w+)\(\d+\) node")


def open_with_casts(path: Path) -> tuple[onnxruntime.InferenceSession, tuple[str, ...]]:
    """Open a file; where kernels are missing, add casts and save it again.

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
            if refused is None:
                raise
            model = onnx.load(path, load_external_data=False)
            # The refused operator may be part of one that onnxruntime decomposes; then that one gets the casts.
            candidates = (refused[1], *find_composite_operators(model))
            found = next((op for op in candidates if op not in cast and cast_operator(model, op)), None)
            if found is None:
                raise
            logger.info("onnxruntime has no %s for this dtype; %s runs in float32", refused[1], found)
            onnx.save(model, path)
            cast.append(found)
