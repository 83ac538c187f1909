"""PEFT's ``adapter_config.json``: what each field means for the weights, and which values cannot be read.

Each field is in one of the tables of :mod:`~adapter_compiler.saving.folders.peft_format.fields`: those of ``APPLIED``
say what the tensors mean, those of ``HARMLESS`` do not change the adapted weights, and those of ``REFUSED`` change them
in ways that are not one ΔW for each weight, so a folder is read only if they are at their defaults. A field that is in
no table is refused as well, unless it is empty.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.peft_format.fields import APPLIED, HARMLESS, MERGED_BY_PEFT, REFUSED
from adapter_compiler.saving.primitives.json_files import read_json_file
from passes.planning.json_schema import show

#: Name of the configuration in a PEFT folder.
PEFT_CONFIG = "adapter_config.json"

#: What PEFT adds to the rank before it divides by it.
PEFT_EPSILON = 1e-5

#: What to do with a folder that cannot be read.
_ADVICE = "merge it with PEFT (merge_and_unload) and save the merged model"

#: Starts that leave the base weights as they are.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

#: Starts that change the base weights; PiSSA also has names such as pissa_niter_4.
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The applied fields of a configuration, with PEFT's defaults for those that are missing.

    Attributes:
        path: the file.
        kind: ``"LORA"`` or ``"ADALORA"``.
        values: the fields.
    """

    path: Path
    kind: str
    values: Mapping[str, Any]

    @property
    def form(self) -> str:
        """The name of the adapter form that all adapters of the folder have."""
        return "svd" if self.kind == "ADALORA" else "dora" if self.values.get("use_dora") else "lora"

    def fail(self, field: str, problem: str, advice: str = _ADVICE) -> NoReturn:
        """Raise :class:`CheckpointError` about a field."""
        raise CheckpointError(f"{self.path}: {field}={show(self.values.get(field))}: {problem}; {advice}")

    def find_scale(self, module: str, rank: int) -> float:
        """What PEFT multiplies B A or P diag(λ) Q by.

            LoRA      alpha / r, or alpha / √r with use_rslora; alpha by module (alpha_pattern)
            AdaLoRA   alpha / (init_r + 1e-5), whatever rank is left; the other fields have no effect there

        Args:
            module: the name that patterns are compared with.
            rank: the rank of the tensors.

        Raises:
            CheckpointError: the rank is not the one that the configuration says, or patterns contradict each other.
        """
        if self.kind == "ADALORA":
            return self._find_adalora_scale(module, rank)
        self._assert_rank(module, rank)
        alpha = self._find_alpha(module)
        return float(alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank))

    def _find_adalora_scale(self, module: str, rank: int) -> float:
        initial, alpha = self.values.get("init_r", 12), self.values.get("lora_alpha", 8)
        pattern = self.values.get("rank_pattern")
        kept = None if pattern is None else pattern.get(f"{module}.lora_E")
        expected = initial if kept is None else sum(kept) if isinstance(kept, list) else kept
        if rank != expected:
            field = "init_r" if kept is None else "rank_pattern"
            self.fail(field, f"module {module} has rank {rank}, expected {expected}", "save the adapters again")
        if alpha <= 0:
            self.fail("lora_alpha", "PEFT takes the rank instead, before and after pruning another one")
        return float(alpha / (initial + PEFT_EPSILON))

    def _assert_rank(self, module: str, rank: int) -> None:
        expected = self._match("rank_pattern", module) or [self.values.get("r", 8)]
        if rank == 0 or rank not in expected:
            field = "rank_pattern" if self._match("rank_pattern", module) else "r"
            shown = " or ".join(map(str, expected))
            self.fail(field, f"module {module} has rank {rank}, expected {shown}", "save the adapters again")

    def _find_alpha(self, module: str) -> Any:
        found = self._match("alpha_pattern", module)
        if len(set(found)) > 1:
            # PEFT takes the first pattern that matches, but writes them in another order than they were given in.
            self.fail("alpha_pattern", f"module {module} matches patterns with the values {found}, expected one value")
        return found[0] if found else self.values.get("lora_alpha", 8)

    def _match(self, field: str, module: str) -> list[Any]:
        """The values of the patterns that match a module."""
        patterns = self._patterns[field]
        return [value for text, pattern, value in patterns if text == module or pattern.match(module)]

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[str, re.Pattern[str], Any]]]:
        """Compiled once: the folder of a large model has a pattern for each of its modules."""
        return {field: self._compile(field) for field in ("rank_pattern", "alpha_pattern")}

    def _compile(self, field: str) -> list[tuple[str, re.Pattern[str], Any]]:
        found = []
        for text, value in (self.values.get(field) or {}).items():
            try:
                found.append((text, re.compile(rf"(.*\.)?({text})$"), value))
            except (re.error, RecursionError, OverflowError) as error:
                self.fail(field, f"{text!r} is no regular expression ({error})", "correct it")
        return found


def read_peft_config(path: Path) -> PeftConfig:
    """Read a configuration.

    Raises:
        CheckpointError: it is missing or damaged, or a field has a value that cannot be read; the field is named.
    """
    values = read_json_file(path, APPLIED, advice="save the adapters again", allow_unknown=True)
    kind = values["peft_type"]
    if kind not in ("LORA", "ADALORA"):
        raise CheckpointError(f"{path}: peft_type is {kind}, expected LORA or ADALORA; {_ADVICE}")
    config = PeftConfig(path=path, kind=kind, values=values)
    for field, (default, reason) in REFUSED.items():
        if values.get(field):
            advice = _ADVICE if field in MERGED_BY_PEFT else "run the model with PEFT"
            config.fail(field, f"{reason}; expected {default!r}", advice)
    for field in sorted(values.keys() - APPLIED.keys() - HARMLESS.keys() - REFUSED.keys()):
        if values[field] not in (None, False, "", [], {}):
            config.fail(field, "this field is unknown here, and may change what the adapters are; expected none")
    _assert_start(config)
    _assert_patterns(config)
    _assert_combination(config)
    return config


def _assert_start(config: PeftConfig) -> None:
    """AdaLoRA has one start, whatever the field says."""
    start = config.values.get("init_lora_weights", True)
    name = start.lower() if isinstance(start, str) else start
    if config.kind == "ADALORA" or name in _STARTS:
        return
    if not any(str(name) == known or str(name).startswith(f"{known}_niter_") for known in _CHANGING_STARTS):
        config.fail("init_lora_weights", f"this start is unknown here, expected one of {_STARTS}")
    config.fail(
        "init_lora_weights",
        "this start changed the base weights, and the folder holds only what is to be added to the changed ones; "
        "expected an adapter of the original weights",
        "save it with save_pretrained(path_initial_model_for_weight_conversion=...); or, to put it on the changed base "
        "weights, set init_lora_weights to true in the file",
    )


def _assert_patterns(config: PeftConfig) -> None:
    """Ranks are numbers in LoRA and lists of kept triplets in AdaLoRA."""
    pattern = config.values.get("rank_pattern") or {}
    expected: type = list if config.kind == "ADALORA" else int
    if odd := [value for value in pattern.values() if not isinstance(value, expected)]:
        what = "lists of true and false" if expected is list else "ranks"
        config.fail("rank_pattern", f"it has {odd[0]!r}, expected {what}", "save the adapters again")


def _assert_combination(config: PeftConfig) -> None:
    """Raise for fields that PEFT does not take together, because it could not have written such a folder."""
    values = config.values
    if config.kind == "ADALORA":
        for field in ("use_dora", "target_parameters"):
            if values.get(field):
                config.fail(field, "PEFT's AdaLoRA does not have this, expected it unset", "correct the file")
    if values.get("lora_bias") and values.get("use_dora"):
        config.fail("lora_bias", "PEFT does not take it with use_dora, expected one of them", "correct the file")


def parse_version(text: str | None) -> tuple[int, ...] | None:
    """The first numbers of a version, such as (0, 21, 2); ``None`` where there is none."""
    found = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(map(int, found[0].split("."))) if found else None


def find_targets(names: Sequence[str], module: str) -> list[str]:
    """The parameters of a module that ``target_parameters`` may mean, as PEFT compares names."""
    found = []
    for name in names:
        owner, _, parameter = name.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    return list(dict.fromkeys(found))
