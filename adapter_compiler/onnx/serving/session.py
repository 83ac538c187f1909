"""Serve one file with many adapters, chosen for each call."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import onnxruntime
import torch

from adapter_compiler.errors import AdapterCompilerError, CheckpointError, ConfigError
from adapter_compiler.onnx.serving.base_tensors import find_other_tensor
from adapter_compiler.onnx.verification.verify import open_session
from adapter_compiler.saving.onnx_files.adapter_tensors import AdapterFile, read_adapter_file, to_ort_value
from adapter_compiler.saving.onnx_files.metadata import METADATA_KEY
from passes.planning.json_schema import Field, Source, check_object, is_object_of, is_text, parse_json

Arrays = dict[str, "numpy.ndarray[Any, Any]"]

_DESCRIPTION: Mapping[str, Field] = {
    "base": Field(expected="checksums of the base model's tensors", fits=is_object_of(is_text), required=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        path: its file.
        ranks: the rank at each weight, by the name of its first input.
        values: what each of the session's further inputs gets.
    """

    path: Path
    ranks: Mapping[str, int]
    values: Mapping[str, onnxruntime.OrtValue] = dataclasses.field(repr=False)


class OnnxAdapters:
    """A session on a file exported with ``adapters="runtime"``, and the adapters loaded for it.

    Threads may run, load, replace and unload at the same time. A run that has begun keeps the adapter that it began
    with, one that begins later gets the new adapter. The adapters are fed as inputs: ``RunOptions.add_active_adapter``
    of onnxruntime keeps a bare pointer to the adapter, which is invalid as soon as Python frees it.

    onnxruntime itself also accepts two active adapters that share names and uses the first, ignores adapters under
    io-binding, and fails late when an adapter belongs to another model. Here a call has at most one adapter, io-binding
    is not offered, and an adapter is compared with the file when it is loaded.

    Example:
        >>> served = OnnxAdapters("model.onnx")  # doctest: +SKIP
        >>> served.load("intents", "intents.onnx_adapter")  # doctest: +SKIP
        >>> served.run({"input_ids": ids, "attention_mask": mask}, adapter="intents")  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, session: onnxruntime.InferenceSession | None = None) -> None:
        """Open a file, or take a session that the caller has opened on it with options of its own.

        Raises:
            VerificationError: onnxruntime does not load the file.
            ConfigError: the file has no inputs for adapters, or some without a default.
        """
        self.path = Path(path)
        self.session = open_session(path) if session is None else session
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._slots = {value.name: value for value in self.session.get_overridable_initializers()}
        self._assert_serves_adapters()
        self._base = self._read_base()
        self._lock = threading.Lock()
        #: Never changed, only exchanged, so that other threads can read it at any time.
        self._adapters: Mapping[str, LoadedAdapter] = MappingProxyType({})

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name, as they are now."""
        return self._adapters

    def load(self, name: str, path: str | Path, *, check_base: bool = True) -> LoadedAdapter:
        """Load an adapter under a name; one of the same name is replaced.

        The file may be changed or deleted afterwards.

        Args:
            name: what to call it in :meth:`run`.
            path: a file that :func:`~adapter_compiler.onnx.serving.adapter_file.save_onnx_adapter` wrote.
            check_base: refuse an adapter that was trained on other base weights than the file has. Without it only
                names, shapes and dtypes are compared.

        Raises:
            CheckpointError: the file is missing, damaged, or belongs to another model. The adapter of this name stays.
        """
        file = read_adapter_file(path)
        self._assert_fits(path, file.tensors)
        if check_base:
            self._assert_same_base(path, file)
        ranks = {key: tensor.shape[1] for key, tensor in file.tensors.items() if key.endswith(".adapter_A")}
        values = {key: to_ort_value(tensor) for key, tensor in file.tensors.items()}
        loaded = LoadedAdapter(path=Path(path), ranks=ranks, values=values)
        with self._lock:
            self._adapters = MappingProxyType({**self._adapters, name: loaded})
        return loaded

    def unload(self, name: str) -> None:
        """Remove an adapter; runs that have begun with it end with it.

        Raises:
            ConfigError: no adapter of this name is loaded.
        """
        with self._lock:
            self._find(name)
            self._adapters = MappingProxyType({key: one for key, one in self._adapters.items() if key != name})

    def run(self, feeds: Mapping[str, Any], adapter: str | None = None) -> Arrays:
        """Run the file with one adapter, or as the base model.

        Args:
            feeds: the model's inputs by name, as numpy arrays.
            adapter: the name of a loaded adapter; ``None`` for the base model.

        Returns:
            The outputs by name.

        Raises:
            ConfigError: the adapter is not loaded, or an input is missing or unknown.
        """
        if missing := sorted(self._inputs.keys() - feeds.keys()):
            raise ConfigError(f"{self.path.name} needs the input {missing[0]}; given: {', '.join(feeds) or 'none'}")
        if odd := sorted(feeds.keys() - self._inputs.keys()):
            raise ConfigError(f"{self.path.name} has no input {odd[0]}; it has: {', '.join(self._inputs)}")
        values = {} if adapter is None else self._find(adapter).values
        return dict(zip(self._outputs, self.session.run(self._outputs, {**feeds, **values}), strict=True))

    def run_with_iobinding(self, *_: Any, **__: Any) -> None:
        """Refused: onnxruntime ignores adapters under io-binding without an error.

        Raises:
            AdapterCompilerError: always.
        """
        raise AdapterCompilerError(
            "onnxruntime ignores active adapters under io-binding, so the base model would run; use run()"
        )

    def _find(self, name: str) -> LoadedAdapter:
        adapters = self._adapters
        if name not in adapters:
            raise ConfigError(f"no adapter {name!r} is loaded; loaded: {', '.join(adapters) or 'none'}")
        return adapters[name]

    def _assert_serves_adapters(self) -> None:
        without_default = sorted(name for name in self._inputs if name.endswith((".adapter_A", ".adapter_B")))
        if without_default:
            raise ConfigError(
                f"{self.path.name}: adapter input {without_default[0]} has no default, so the file does not "
                "run without an adapter; export it with adapters='runtime'"
            )
        if not any(name.endswith(".adapter_A") for name in self._slots):
            raise ConfigError(f"{self.path.name} has no inputs for adapters; export it with adapters='runtime'")

    def _read_base(self) -> Mapping[str, str] | None:
        """Checksums of the base model's tensors, as the export wrote them into the file."""
        text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            return None
        source = Source(name=str(self.path), error=ConfigError, advice="export it again with adapters='runtime'")
        description = check_object(
            source, "its description", parse_json(source, text), _DESCRIPTION, allow_unknown=True
        )
        base: Mapping[str, str] | None = description.get("base")
        return base

    def _assert_same_base(self, path: str | Path, file: AdapterFile) -> None:
        if self._base is None:
            raise CheckpointError(
                f"{self.path.name} does not say which base weights it holds, so {path} cannot be compared with it; "
                "export it again with adapters='runtime', or load with check_base=False"
            )
        other = find_other_tensor(self._base, file.base)
        if other is not None:
            found, wanted = (base.get(other, "missing").partition(":")[0] for base in (file.base, self._base))
            problem = "has other values" if found == wanted else f"is {found}, not {wanted},"
            raise CheckpointError(
                f"{path} belongs to another base model than {self.path.name}: {other} {problem} in the model that it "
                "was saved from; export that model with adapters='runtime', or load with check_base=False if the "
                "difference does not matter"
            )

    def _assert_fits(self, path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
        if odd := sorted(tensors.keys() ^ self._slots.keys()):
            side = "the adapter" if odd[0] in tensors else self.path.name
            raise CheckpointError(
                f"{path}: {len(odd)} inputs differ from those of {self.path.name}, for example {odd[0]} is in {side} "
                "only; it belongs to another model"
            )
        for name, tensor in tensors.items():
            self._assert_fits_slot(path, name, tensor)
            right = name.removesuffix("A") + "B"
            if name.endswith(".adapter_A") and tensor.shape[1] != tensors[right].shape[0]:
                raise CheckpointError(
                    f"{path}: {name} has rank {tensor.shape[1]} but {right} has {tensors[right].shape[0]}, expected "
                    "the same; save it again"
                )

    def _assert_fits_slot(self, path: str | Path, name: str, tensor: torch.Tensor) -> None:
        wanted, dtype = self._slots[name].shape, to_ort_value(tensor).data_type()
        if dtype != self._slots[name].type:
            raise CheckpointError(
                f"{path}: {name} is a {dtype}, {self.path.name} expects a {self._slots[name].type}; save the adapter "
                "from a model of that dtype, or export the base model in the adapter's"
            )
        sizes = zip(wanted, tensor.shape, strict=False)
        if len(wanted) != tensor.dim() or any(isinstance(want, int) and want != size for want, size in sizes):
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, {self.path.name} expects {list(wanted)}; "
                "it belongs to another model"
            )
