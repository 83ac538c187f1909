"""Methods of an adapted model under PEFT's names, where the meaning is the same."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.named_adapters import remove_adapter, use_adapter
from adapter_compiler.errors import AdapterCompilerError, ConfigError
from adapter_compiler.saving.folders.write_peft import save_peft_adapters

#: Options of other libraries' ``save_pretrained`` that change nothing here: the file is always one of safetensors.
_WITHOUT_EFFECT = frozenset({"is_main_process", "max_shard_size", "safe_serialization", "state_dict"})


class _Foldable(Protocol):
    def fold(self, *, parametrized: str = ...) -> nn.Module:
        """The user's own model with every ΔW merged into its weight."""

    def disable_adapters(self) -> contextlib.AbstractContextManager[None]:
        """A context in which this thread runs the user's module without adapters."""


class PeftNames(AdapterState):
    """The methods that users of PEFT call; :class:`~adapter_compiler.AdaptedModel` inherits them."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trained values, and the number of all values including those of adapters."""
        return sum(p.numel() for p in self.trainable_parameters()), sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print both numbers on standard output; :meth:`report` has more details."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / max(1, total)
        sys.stdout.write(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}\n")

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter; there is always one."""
        return [self.active_adapter]

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make an adapter the active one, like ``use``.

        Raises:
            ConfigError: there is no such adapter, or several are given.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ConfigError(
                f"set_adapter({names!r}) names {len(names)} adapters, expected one; to run with several at once, "
                "combine them: combine({name: weight, ...}, name='sum')"
            )
        use_adapter(self, names[0])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, like ``remove_adapter``.

        Raises:
            ConfigError: there is no such adapter, or it is the active one.
        """
        remove_adapter(self, adapter_name)

    def disable_adapter(self: _Foldable) -> contextlib.AbstractContextManager[None]:
        """A context in which this thread runs without adapters, like ``disable_adapters``."""
        return self.disable_adapters()

    def get_base_model(self) -> nn.Module:
        """The user's module; as in PEFT, a call of it runs with the adapters."""
        return self.module

    def merge_and_unload(
        self: _Foldable, *, safe_merge: bool = False, parametrized: str = "right_inverse"
    ) -> nn.Module:
        """A copy of the user's own model with every ΔW merged, like ``fold``; this model does not change.

        Args:
            safe_merge: check that all values of the result are finite.
            parametrized: as of ``fold``.

        Raises:
            AdapterCompilerError: with ``safe_merge``, a merged parameter has inf or nan.
        """
        merged = self.fold(parametrized=parametrized)
        for name, parameter in merged.named_parameters() if safe_merge else ():
            if not bool(torch.isfinite(parameter).all()):
                raise AdapterCompilerError(
                    f"{name} has inf or nan after merging, expected finite values; look for a learning rate that is "
                    "too high, or load an earlier state"
                )
        return merged

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the active adapter in PEFT's format: LoRA of the live ranks, which includes λ and the scale.

        To continue training later, use ``save``: PEFT's LoRA format cannot store λ.

        Args:
            save_directory: the folder.
            options: of transformers' method; ``is_main_process=False`` writes nothing, others have no effect.

        Raises:
            ConfigError: PEFT does not support an adapter at one of the weights, or an option is unknown.
        """
        if unknown := sorted(options.keys() - _WITHOUT_EFFECT):
            raise ConfigError(
                f"save_pretrained has no option {unknown[0]!r}, expected none of its own; leave it out, or use save()"
            )
        if options.get("is_main_process", True):
            save_peft_adapters(self, save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Refuse: the method of the user's model would upload the frozen weights without the adapters.

        Raises:
            ConfigError: always, with the two calls that upload the adapters.
        """
        raise ConfigError(
            f"push_to_hub({repo_id!r}) would upload the frozen weights without the adapters; expected a folder of "
            f"adapters: save_pretrained(folder), then huggingface_hub.upload_folder(repo_id={repo_id!r}, "
            "folder_path=folder). For the merged model: fold().push_to_hub(...)"
        )
