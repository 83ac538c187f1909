"""The fields of PEFT's ``LoraConfig`` and ``AdaLoraConfig``, and what each means for the adapted weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passes.planning.json_schema import (
    Field,
    is_count,
    is_finite,
    is_flag,
    is_list_of,
    is_object_of,
    is_or_null,
    is_text,
)

_INDICES = is_list_of(is_count)

#: Fields that say what the tensors mean.
APPLIED: Mapping[str, Field] = {
    "peft_type": Field(expected="'LORA' or 'ADALORA'", fits=is_text),
    "peft_version": Field(expected="a version", fits=is_or_null(is_text), required=False),
    "r": Field(expected="a rank of at least 1", fits=lambda v: is_count(v) and v > 0, required=False),
    "init_r": Field(expected="a rank of at least 1", fits=lambda v: is_count(v) and v > 0, required=False),
    "lora_alpha": Field(expected="a finite number", fits=is_finite, required=False),
    "rank_pattern": Field(
        expected="ranks (AdaLoRA: lists of true and false) by pattern",
        fits=is_or_null(is_object_of(lambda v: is_count(v) or is_list_of(is_flag)(v))),
        required=False,
    ),
    "alpha_pattern": Field(
        expected="finite numbers by pattern", fits=is_or_null(is_object_of(is_finite)), required=False
    ),
    "use_rslora": Field(expected="true or false", fits=is_flag, required=False),
    "use_dora": Field(expected="true or false", fits=is_flag, required=False),
    "fan_in_fan_out": Field(expected="true or false", fits=is_flag, required=False),
    "bias": Field(
        expected="'none', 'all' or 'lora_only'", fits=lambda v: v in ("none", "all", "lora_only"), required=False
    ),
    "lora_bias": Field(expected="true or false", fits=is_flag, required=False),
    "modules_to_save": Field(expected="a list of names", fits=is_or_null(is_list_of(is_text)), required=False),
    "trainable_token_indices": Field(
        expected="a list of token indices, or lists by name",
        fits=is_or_null(lambda v: _INDICES(v) or is_object_of(_INDICES)(v)),
        required=False,
    ),
    "target_parameters": Field(expected="a list of names", fits=is_or_null(is_list_of(is_text)), required=False),
    "ensure_weight_tying": Field(expected="true or false", fits=is_flag, required=False),
    "init_lora_weights": Field(
        expected="true, false or a name", fits=is_or_null(lambda v: is_flag(v) or is_text(v)), required=False
    ),
    "velora_config": Field(expected="an object", fits=is_or_null(lambda v: isinstance(v, dict)), required=False),
    "monteclora_config": Field(expected="an object", fits=is_or_null(lambda v: isinstance(v, dict)), required=False),
}

#: Fields that do not change the adapted weights, and why.
HARMLESS: Mapping[str, str] = {
    "task_type": "chooses PEFT's wrapper class; the heads that it trains are in modules_to_save",
    "auto_mapping": "names the class of the base model",
    "base_model_name_or_path": "says where the base model comes from; the user gives the base",
    "revision": "says which version of the base model; the user gives the base",
    "inference_mode": "freezes parameters",
    "target_modules": "chooses the modules; the names of the tensors say which they were",
    "exclude_modules": "likewise",
    "layers_to_transform": "likewise",
    "layers_pattern": "likewise",
    "lora_dropout": "acts in training only",
    "megatron_core": "names a module that is used only with megatron_config",
    "loftq_config": "acts at the start only; init_lora_weights says whether it did",
    "eva_config": "likewise",
    "corda_config": "likewise",
    "lora_ga_config": "likewise",
    "qalora_group_size": "is used only with use_qalora",
    "runtime_config": "says on which device PEFT computes; PEFT neither saves nor reads it",
    "target_r": "belongs to AdaLoRA's schedule; the tensors have the ranks that it led to",
    "tinit": "likewise",
    "tfinal": "likewise",
    "deltaT": "likewise",
    "total_step": "likewise",
    "beta1": "likewise",
    "beta2": "likewise",
    "orth_reg_weight": "is a weight in AdaLoRA's training loss",
}

#: Fields that must be at their default, the default, and why another value cannot be read.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "alora_invocation_tokens": (None, "Activated LoRA acts on the tokens after an invocation only, so it is no ΔW"),
    "megatron_config": (None, "tensors of Megatron's parallel layers are shards of a weight's adapter"),
    "use_qalora": (False, "QALoRA's A acts on inputs averaged in groups, so it does not have the weight's columns"),
    "use_bdlora": (None, "BD-LoRA stores the blocks of block-diagonal A and B"),
    "arrow_config": (None, "Arrow chooses between several adapters for each token, so it is no ΔW"),
    "kasa_config": (None, "KaSA removes singular components from the base weights, which the folder does not hold"),
    "layer_replication": (None, "layers of the base model are repeated, and the copies have adapters of their own"),
}

#: Those of them that PEFT merges.
MERGED_BY_PEFT = ("use_bdlora", "kasa_config", "megatron_config")
