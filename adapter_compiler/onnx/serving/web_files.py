"""Files for onnxruntime-web: a model whose adapters are plain inputs, and the adapters as JSON.

onnxruntime-web has no reader for ``.onnx_adapter`` files, and refuses values for inputs that have a default.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import onnx

from adapter_compiler.errors import ConfigError
from adapter_compiler.onnx.serving.session import OnnxAdapters
from adapter_compiler.saving.primitives.files import written_beside

#: What onnxruntime-web calls the dtypes that it has an array for.
_TYPES = {"float32": "float32", "float64": "float64", "float16": "float16"}


def write_web_files(path: str | Path, adapters: Mapping[str, str | Path], folder: str | Path) -> tuple[Path, Path]:
    """Write ``model.onnx`` and ``adapters.json`` into a folder, for a page that switches adapters.

    In the model, what an adapter may change is a required input. The JSON has, for ``"base"`` and for each adapter, all
    of these inputs by name, with ``type`` and ``dims`` as ``new ort.Tensor`` takes them and ``data``, the bytes in
    base64, little endian. A call of the page is ``session.run({...inputs, ...adapter})``.

    Args:
        path: a file that was exported with ``adapters="runtime"``.
        adapters: files of ``save_onnx_adapter``, by the name that the page is to use; not ``"base"``.
        folder: where to write; made if it is not there.

    Returns:
        The two files.

    Raises:
        ConfigError: the file has no inputs for adapters, an adapter is called ``"base"``, or a dtype has no array in
            JavaScript.
        CheckpointError: an adapter is damaged or belongs to another model.
    """
    if "base" in adapters:
        raise ConfigError("an adapter is called 'base', which means the model alone; give it another name")
    served, folder = OnnxAdapters(path), Path(folder)
    for name, file in adapters.items():
        served.load(name, file)
    model = onnx.load(path)
    defaults = _take_defaults(model)
    entries = {"base": {name: _describe(name, onnx.numpy_helper.to_array(one)) for name, one in defaults.items()}}
    for name, loaded in served.adapters.items():
        entries[name] = {key: _describe(key, value.numpy()) for key, value in loaded.values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / "model.onnx") as draft:
        onnx.save(model, draft)
    with written_beside(folder / "adapters.json") as draft:
        draft.write_text(json.dumps(entries), encoding="utf-8")
    return folder / "model.onnx", folder / "adapters.json"


def _take_defaults(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Remove the defaults of inputs from a model, and return them by name."""
    names = {value.name for value in model.graph.input}
    taken = {one.name: one for one in model.graph.initializer if one.name in names}
    kept = [one for one in model.graph.initializer if one.name not in taken]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return taken


def _describe(name: str, array: numpy.ndarray[Any, Any]) -> dict[str, Any]:
    if str(array.dtype) not in _TYPES:
        raise ConfigError(
            f"{name} is {array.dtype}, expected one of {', '.join(_TYPES)}, for which JavaScript has an array; export "
            "the model in one of them"
        )
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {"type": _TYPES[str(array.dtype)], "dims": list(array.shape), "data": base64.b64encode(data).decode()}
