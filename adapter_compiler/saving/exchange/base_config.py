"""What ``config.json`` says of the model that adapters belong to: names of weights depend on it in other run times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.primitives.json_files import read_json_file
from passes.planning.json_schema import Field, is_count, is_flag, is_list_of, is_text

_FILE = "config.json"

_SCHEMA: Mapping[str, Field] = {
    "architectures": Field(expected="a list of names", fits=is_list_of(is_text)),
    "model_type": Field(expected="the name of a type of model", fits=is_text),
    "tie_word_embeddings": Field(expected="true or false", fits=is_flag, required=False),
    **{
        name: Field(expected="a number", fits=lambda value: value is None or is_count(value), required=False)
        for name in ("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads")
    },
}

#: Types of models whose head is tied to the embeddings unless their configuration says otherwise.
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "gpt2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The configuration of a base model, as transformers writes it.

    Attributes:
        path: the file.
        values: its fields.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return str(next(iter(self.values["architectures"]), ""))

    @property
    def model_type(self) -> str:
        """The type of the model, such as ``llama``."""
        return str(self.values["model_type"])

    @property
    def is_tied(self) -> bool:
        """Whether the head has the weight of the embeddings."""
        return bool(self.values.get("tie_word_embeddings", self.model_type in _TIED_BY_DEFAULT))

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self._count("num_hidden_layers", "n_layer")

    @property
    def heads(self) -> int:
        """The number of heads of queries."""
        return self._count("num_attention_heads", "n_head")

    @property
    def key_heads(self) -> int:
        """The number of heads of keys."""
        found = self.values.get("num_key_value_heads")
        return self.heads if found is None else int(found)

    def _count(self, *names: str) -> int:
        found = next((self.values[name] for name in names if self.values.get(name)), None)
        if found is None:
            raise ConfigError(
                f"{self.path} has no {' and no '.join(names)}, expected a number; give the folder of the base model "
                "as transformers writes it"
            )
        return int(found)


def read_base_config(base: str | Path | None, purpose: str) -> BaseConfig:
    """Read the configuration of a base model.

    Args:
        base: the model's folder, or its ``config.json``.
        purpose: what it is needed for, for messages.

    Raises:
        ConfigError: there is none, or it is not one that transformers writes.
    """
    if base is None:
        raise ConfigError(
            f"no base model is given, but names of weights depend on it in {purpose}; expected the folder of the base "
            "model with its config.json; give it with --base (base= in Python)"
        )
    path = Path(base)
    path = path / _FILE if path.is_dir() else path
    advice = "give the folder of the base model as transformers writes it"
    values = read_json_file(path, _SCHEMA, advice=advice, allow_unknown=True, error=ConfigError)
    return BaseConfig(path=path, values=values)
