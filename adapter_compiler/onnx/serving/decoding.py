"""Decode token by token with a file whose inputs and outputs are the key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnxruntime

from adapter_compiler.errors import ConfigError
from adapter_compiler.onnx.serving.session import OnnxAdapters
from adapter_compiler.onnx.verification.verify import open_session

Array = numpy.ndarray[Any, Any]

#: Runs a file: takes inputs by name, returns outputs by name.
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": numpy.float32, "tensor(float16)": numpy.float16, "tensor(double)": numpy.float64}


class Decoding:
    """One batch of sequences and its cache; each :meth:`feed` gives it further tokens."""

    def __init__(self, inputs: Sequence[Any], run: Run) -> None:
        """Start with an empty cache.

        Args:
            inputs: what ``get_inputs`` of the session returns.
            run: runs the file.
        """
        self._names = {value.name for value in inputs}
        self._past = {value.name: value for value in inputs if value.name.startswith(_PAST)}
        self._run = run
        self._cache: dict[str, Array] = {}
        self._mask: Array | None = None

    def feed(self, tokens: Array, attention_mask: Array | None = None) -> Array:
        """Append tokens and return their logits [batch, new tokens, vocabulary].

        Args:
            tokens: token ids [batch, new tokens]; the first call gives the prompts, padded on the left.
            attention_mask: of the same shape, 0 for padding; by default no token is padding.

        Raises:
            ConfigError: the shape is not [batch, tokens], or the batch is not that of the calls before.
        """
        tokens = numpy.ascontiguousarray(tokens, dtype=numpy.int64)
        new = numpy.ones_like(tokens) if attention_mask is None else numpy.asarray(attention_mask, dtype=numpy.int64)
        self._assert_shapes(tokens, new)
        mask = new if self._mask is None else numpy.concatenate([self._mask, new], axis=1)
        positions = numpy.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        cache = self._cache or {name: _empty(value, len(tokens)) for name, value in self._past.items()}
        found = self._run({name: array for name, array in {**given, **cache}.items() if name in self._names})
        self._mask = mask
        self._cache = {name: found[_PRESENT + name.removeprefix(_PAST)] for name in self._past}
        return found["logits"]

    def _assert_shapes(self, tokens: Array, mask: Array) -> None:
        if tokens.ndim != 2 or not tokens.size:
            raise ConfigError(f"tokens have shape {list(tokens.shape)}, expected [batch, tokens], one token or more")
        if mask.shape != tokens.shape:
            raise ConfigError(
                f"attention_mask has shape {list(mask.shape)}, expected that of the tokens, {list(tokens.shape)}; "
                "give the mask of the new tokens only"
            )
        if self._mask is not None and len(self._mask) != len(tokens):
            raise ConfigError(
                f"the tokens have {len(tokens)} rows, expected {len(self._mask)} as in the calls before; start again"
            )


class OnnxDecoder:
    """A file of :func:`~adapter_compiler.onnx.decoders.export_decoder.export_decoder` on onnxruntime.

    Example:
        >>> decoder = OnnxDecoder("decoder.onnx")  # doctest: +SKIP
        >>> decoder.generate(tokens, max_new_tokens=32)  # doctest: +SKIP

    With adapters, ``OnnxDecoder(OnnxAdapters("served.onnx"))`` and ``generate(..., adapter="name")``.
    """

    def __init__(self, source: str | Path | onnxruntime.InferenceSession | OnnxAdapters) -> None:
        """Open a file, or take a session, or what serves adapters.

        Raises:
            VerificationError: onnxruntime does not load the file.
            ConfigError: the file has no inputs for a cache, or one of a dtype that numpy lacks.
        """
        if isinstance(source, (str, Path)):
            source = open_session(source)
        self.adapters = source if isinstance(source, OnnxAdapters) else None
        self.session = source.session if isinstance(source, OnnxAdapters) else source
        self._inputs = self.session.get_inputs()
        self._outputs = [value.name for value in self.session.get_outputs()]
        caches = [value for value in self._inputs if value.name.startswith(_PAST)]
        if not caches or "input_ids" not in {value.name for value in self._inputs}:
            raise ConfigError(
                f"the file's inputs are {', '.join(value.name for value in self._inputs) or 'none'}, expected "
                "input_ids and past_key_values.0.key and so on; export it with export_decoder"
            )
        odd = next((value for value in caches if value.type not in _DTYPES), None)
        if odd is not None:
            raise ConfigError(f"{odd.name} is a {odd.type}, expected one of {', '.join(_DTYPES)}")

    def start(self, adapter: str | None = None) -> Decoding:
        """An empty cache, for tokens that you choose yourself: each ``feed`` returns logits.

        Raises:
            ConfigError: the adapter is not loaded.
        """
        return Decoding(self._inputs, self._choose_run(adapter))

    def generate(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        max_new_tokens: int,
        adapter: str | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
        choose: Callable[[Array], Array] | None = None,
    ) -> Array:
        """Continue prompts.

        Args:
            input_ids: token ids [batch, length], shorter prompts padded on the left.
            attention_mask: of the same shape, 0 for padding.
            max_new_tokens: how many tokens to append at most.
            adapter: the name of a loaded adapter; ``None`` for the file alone.
            eos_token_id: rows that have got this token are finished; without it, all tokens are made.
            pad_token_id: what finished rows get.
            choose: from logits [batch, vocabulary] the next tokens [batch]; by default the most likely.

        Returns:
            Prompts and new tokens [batch, length + new], as transformers' ``generate`` returns them.

        Raises:
            ConfigError: shapes do not fit, there is no such adapter, or ``max_new_tokens`` is below one.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected one or more")
        choose = choose or (lambda logits: logits.argmax(-1))
        decoding, made = self.start(adapter), [numpy.asarray(input_ids, dtype=numpy.int64)]
        logits = decoding.feed(made[0], attention_mask)
        done = numpy.zeros(len(made[0]), dtype=bool)
        while True:
            following = numpy.where(done, pad_token_id, choose(logits[:, -1]))
            made.append(following[:, None].astype(numpy.int64))
            done |= following == eos_token_id
            if done.all() or len(made) > max_new_tokens:
                return numpy.concatenate(made, axis=1)
            logits = decoding.feed(made[-1])

    def _choose_run(self, adapter: str | None) -> Run:
        if self.adapters is not None:
            served = self.adapters
            if adapter is not None and adapter not in served.adapters:
                raise ConfigError(f"no adapter {adapter!r} is loaded; loaded: {', '.join(served.adapters) or 'none'}")
            return lambda feeds: served.run(feeds, adapter)
        if adapter is not None:
            raise ConfigError(
                f"adapter={adapter!r}: this decoder has no adapters; make it as OnnxDecoder(OnnxAdapters(file))"
            )
        return lambda feeds: dict(zip(self._outputs, self.session.run(self._outputs, dict(feeds)), strict=True))


def _empty(value: Any, batch: int) -> Array:
    _, heads, _, size = value.shape
    return numpy.zeros((batch, heads, 0, size), dtype=_DTYPES[value.type])
