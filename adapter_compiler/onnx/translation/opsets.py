"""The ONNX operator sets that users can choose, and the check that a file has the chosen one.

torch.export's exporter writes opset 18 and converts up or down from there; if it cannot, it keeps another one without
an error. The TorchScript exporter has separate translations for each of the older ones.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from adapter_compiler.errors import ConfigError, ExportError

#: The oldest set that an exporter writes and onnxruntime still runs.
OLDEST_OPSET = 7
#: The newest one that the TorchScript exporter writes.
NEWEST_TRACED_OPSET = 20
#: The newest one that onnxscript converts to.
NEWEST_OPSET = 25


def check_opset(opset: object) -> None:
    """Refuse operator sets that no exporter writes, before anything is exported.

    Raises:
        ConfigError: it is not an integer, or out of range.
    """
    newest = min(NEWEST_OPSET, onnx.defs.onnx_opset_version())
    expected = f"expected None or an integer from {OLDEST_OPSET} to {newest}; leave it out for the exporter's own"
    if opset is not None and (type(opset) is not int or not OLDEST_OPSET <= opset <= newest):
        raise ConfigError(f"export_onnx(opset={opset!r}): {expected}, or ask for one that your runtime has")


def read_opset(path: Path) -> int:
    """The operator set of a file."""
    model = onnx.load(path, load_external_data=False)
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def assert_opset(path: Path, wanted: int | None) -> int:
    """The operator set of a file, which must be the chosen one, if any.

    Raises:
        ExportError: the exporter wrote another one.
    """
    found = read_opset(path)
    if wanted is not None and found != wanted:
        raise ExportError(
            f"the exporter wrote opset {found}, requested was {wanted}: some operator of this model has no form in it; "
            "ask for a newer one"
        )
    return found
