"""Adapters of parameters that ``target_parameters`` names: which parameter each belongs to, and stacks of experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from adapter_compiler.saving.folders.base_weights import BaseWeights
from adapter_compiler.saving.folders.peft_format.site_maker import LOAD_OR_MERGE, SiteMaker
from adapter_compiler.saving.folders.peft_format.tensors import PeftUpdate
from adapter_compiler.saving.folders.saved_adapters import SavedAdapter
from adapter_compiler.saving.folders.stored_parameters import Expert
from adapter_compiler.saving.layer_kinds import PARAMETER

#: So many parameters of one module can be distinguished by their shapes.
_MOST = 6


def make_parameters(
    maker: SiteMaker, base: BaseWeights, module: str, names: Sequence[str], group: Sequence[PeftUpdate]
) -> dict[str, SavedAdapter]:
    """The adapters of one module by site.

    PEFT wraps the parameters in the order of their registration, and the names of the tensors say only how many were
    wrapped after each. Where the order is not known, the shapes must leave one way.

    Args:
        maker: makes the sites.
        base: the base.
        module: the name of the module.
        names: the parameters that may be meant.
        group: the adapters.
    """
    updates = sorted(group, key=lambda update: -update.depth)
    present = [name for name in names if f"{module}.{name}" in base.shapes]
    if not present:
        maker.refuse(
            module,
            f"target_parameters names {', '.join(names)}, but {base.name} has no such tensor of this module",
            "give a base that is saved in the model's own names (transformers writes the experts of some models one by "
            "one), or merge the adapters with PEFT",
        )
    orders = _find_orders(maker, base, module, present, updates)
    if len(orders) != 1:
        what = "more than one" if orders else "no"
        maker.refuse(
            module,
            f"target_parameters names {', '.join(names)}, and there is {what} way to assign its {len(updates)} "
            f"adapters to parameters of {base.name} by their shapes",
            LOAD_OR_MERGE,
        )
    found: dict[str, SavedAdapter] = {}
    for name, update in zip(orders[0], updates, strict=True):
        found |= _make_parameter(maker, base, f"{module}.{name}", update)
    return found


def _find_orders(
    maker: SiteMaker, base: BaseWeights, module: str, names: Sequence[str], updates: Sequence[PeftUpdate]
) -> list[tuple[str, ...]]:
    """The parameters in the order of the adapters, in each way that is possible."""
    if len(names) > _MOST:
        return []
    known = tuple(name for name in base.parameters.get(module, ()) if name in names)
    orders = [known] if len(known) == len(updates) else list(itertools.permutations(names, len(updates)))
    return [
        order
        for order in orders
        if all(_fits(maker, base, f"{module}.{name}", one) for name, one in zip(order, updates, strict=True))
    ]


def _fits(maker: SiteMaker, base: BaseWeights, weight: str, update: PeftUpdate) -> bool:
    """Whether an adapter can be that of a parameter."""
    shape, size = base.shapes[weight], maker.features(update)
    if len(shape) != 3:
        return shape == size
    layout = base.find_stack_layout(weight)
    sizes = [size[::-1] if one else size for one in ((True, False) if layout is None else (layout,))]
    return shape[1:] in sizes and maker.shapes(update)[1][0] % max(1, shape[0]) == 0


def _make_parameter(maker: SiteMaker, base: BaseWeights, weight: str, update: PeftUpdate) -> dict[str, SavedAdapter]:
    shape = base.shapes[weight]
    if len(shape) == 2:
        return {weight: maker.make(update, weight, shape, PARAMETER, pattern=weight)}
    is_transposed = _find_layout(maker, base, weight, update)
    count, rows = shape[:2]
    sites = {}
    for index in range(count):
        name = f"{weight}.rows_{index * rows}_{(index + 1) * rows}"
        sites[name] = maker.make(
            update,
            name,
            shape,
            PARAMETER,
            pattern=weight,
            rows=(index * rows, (index + 1) * rows),
            expert=Expert(index=index, count=count),
            is_transposed=is_transposed,
        )
    return sites


def _find_layout(maker: SiteMaker, base: BaseWeights, weight: str, update: PeftUpdate) -> bool:
    """Whether the matrices of a stack are stored [in, out]."""
    shape, (out, columns) = base.shapes[weight], maker.features(update)
    layout = base.find_stack_layout(weight)
    if out == columns and layout is None:
        maker.refuse(
            weight,
            "target_parameters: its matrices are square, and only the module says whether they are [out, in] or "
            "[in, out] (is_transposed)",
            LOAD_OR_MERGE,
        )
    is_transposed = bool(layout) if out == columns else shape[1:] == (columns, out)
    if shape[0] == 1 and is_transposed:
        maker.refuse(weight, "target_parameters: PEFT does not transpose the update of a stack of one matrix")
    return is_transposed
