"""Attributes of the user's module, read and set through the adapted model around it."""

from __future__ import annotations

from typing import Any

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.model.interface.checkpointing import adjust_method

#: Attributes that are always the adapted model's own, even if the user's module has one of the same name.
_OWN = frozenset(
    {
        "adapter_set",
        "fold_report",
        "options",
        "quantization_report",
        "rejected",
        "unadapted_sites",
        "unused",
        "was_called",
    }
)


class UserAttributes(AdapterState):
    """Look up in the user's module what the adapted model does not define, and set there what only it has."""

    def __getattr__(self, name: str) -> Any:
        """Look up in the user's module what this class does not define."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or (name.startswith("__") and name.endswith("__")):
                raise
        try:
            return adjust_method(module, name, getattr(module, name))
        except AttributeError as error:
            kind = type(module).__name__
            raise AttributeError(f"neither AdaptedModel nor the {kind} in it gives {name!r}: {error}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that only the user's module has in the user's module, and any other one here."""
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None or self._defines(name) or not hasattr(module, name):
            super().__setattr__(name, value)
        else:
            setattr(module, name, value)

    def _defines(self, name: str) -> bool:
        return name.startswith("_") or name in _OWN or name in self._modules or hasattr(type(self), name)

    def _get_name(self) -> str:
        """The name of the user's class, by which libraries recognize a model."""
        return type(self.module).__name__
