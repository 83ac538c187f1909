"""Serve one file with many adapters, switched per call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import onnxruntime

from adapter_compiler.errors import AdapterCompilerError, CheckpointError, ConfigError
from adapter_compiler.onnx.serving.adapter_file import hash_inputs, read_adapter_file, read_model_version
from adapter_compiler.onnx.verification.verify import open_session

Arrays = dict[str, "numpy.ndarray[Any, Any]"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        path: its file.
        ranks: rank by site input.
        handle: onnxruntime's object.
    """

    path: Path
    ranks: Mapping[str, int]
    handle: onnxruntime.LoraAdapter


class OnnxAdapters:
    """A session on a file exported with ``adapters="runtime"``, and the adapters loaded for it.

    onnxruntime itself accepts two active adapters that share names and lets the first win, ignores adapters
    under io-binding, and fails late when an adapter belongs to another model. Here at most one is active in a
    call, io-binding is not offered, and an adapter is checked against the file when it is loaded.

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
        self._adapters: dict[str, LoadedAdapter] = {}
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._slots = {value.name: value for value in self.session.get_overridable_initializers()}
        self._assert_serves_adapters()

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name."""
        return dict(self._adapters)

    def load(self, name: str, path: str | Path) -> LoadedAdapter:
        """Load an adapter under a name; one of the same name is replaced.

        Raises:
            CheckpointError: the file is missing, damaged, or belongs to another model.
        """
        tensors = read_adapter_file(path)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        self._assert_fits(path, shapes)
        handle = onnxruntime.LoraAdapter()
        handle.Load(str(path))
        ranks = {key: shape[1] for key, shape in shapes.items() if key.endswith(".adapter_A")}
        loaded = LoadedAdapter(path=Path(path), ranks=ranks, handle=handle)
        self._adapters[name] = loaded
        return loaded

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        self._find(name)
        del self._adapters[name]

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
        options = None
        if adapter is not None:
            options = onnxruntime.RunOptions()
            options.add_active_adapter(self._find(adapter).handle)
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(feeds), options), strict=True))

    def run_with_iobinding(self, *_: Any, **__: Any) -> None:
        """Refused: onnxruntime ignores adapters under io-binding without a word.

        Raises:
            AdapterCompilerError: always.
        """
        raise AdapterCompilerError(
            "onnxruntime ignores active adapters under io-binding, so the base model would run; use run()"
        )

    def _find(self, name: str) -> LoadedAdapter:
        if name not in self._adapters:
            raise ConfigError(f"no adapter {name!r} is loaded; loaded: {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]

    def _assert_serves_adapters(self) -> None:
        without_default = sorted(name for name in self._inputs if name.endswith((".adapter_A", ".adapter_B")))
        if without_default:
            raise ConfigError(
                f"{self.path.name}: adapter input {without_default[0]} has no default, so the file does not "
                "run without an adapter; export it with adapters='runtime'"
            )
        if not any(name.endswith(".adapter_A") for name in self._slots):
            raise ConfigError(f"{self.path.name} has no inputs for adapters; export it with adapters='runtime'")

    def _assert_fits(self, path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if odd := sorted(shapes.keys() ^ self._slots.keys()):
            side = "the adapter" if odd[0] in shapes else self.path.name
            raise CheckpointError(
                f"{path}: {len(odd)} inputs differ from those of {self.path.name}, for example {odd[0]} is in {side} "
                "only; it belongs to another model"
            )
        for name, shape in shapes.items():
            wanted = self._slots[name].shape
            fits = len(wanted) == len(shape) and all(
                isinstance(want, str) or want is None or want == size for want, size in zip(wanted, shape, strict=True)
            )
            if not fits:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(shape)}, {self.path.name} expects {list(wanted)}; "
                    "it belongs to another model"
                )
            left, right = name, name.removesuffix("A") + "B"
            if name.endswith(".adapter_A") and shape[1] != shapes[right][0]:
                raise CheckpointError(f"{path}: {left} has rank {shape[1]} but {right} has {shapes[right][0]}")
        if read_model_version(path) != hash_inputs(shapes):
            raise CheckpointError(f"{path}: its inputs are not those it was written with; save the adapter again")
