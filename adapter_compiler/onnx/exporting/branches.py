"""Which branches of a file's ``If`` nodes no verified input takes."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import onnx

from adapter_compiler.onnx.verification.cases import VerificationCase
from adapter_compiler.onnx.verification.values import run_session
from adapter_compiler.onnx.verification.verify import open_session


def find_untaken_branches(
    draft: Path, cases: Sequence[VerificationCase], inputs: Sequence[str], verified: Collection[str]
) -> tuple[str, ...]:
    """Run a file on the inputs, and say which branch of which ``If`` none of them takes.

    Only nodes of the main graph are looked at, not those inside of loops and other branches.

    Args:
        draft: the file.
        cases: inputs.
        inputs: names of its inputs, in the order of the calls' tensors.
        verified: names of the cases that it was verified on; the others are left out.
    """
    model = onnx.load(draft, load_external_data=False)
    computed = {name for node in model.graph.node for name in node.output}
    found = [node for node in model.graph.node if node.op_type == "If" and node.input[0] in computed]
    if not found:
        return ()
    conditions = {node.name or node.output[0]: node.input[0] for node in found}
    calls = [one for case in cases for one in (case, *case.alternatives) if one.name in verified]
    seen = _run_conditions(draft, model, sorted(set(conditions.values())), calls, inputs)
    return tuple(
        f"the branch of {node} where its condition is {str(value).lower()}"
        for node, condition in conditions.items()
        for value in (True, False)
        if value not in seen[condition]
    )


def _run_conditions(
    draft: Path, model: onnx.ModelProto, names: Sequence[str], cases: Sequence[VerificationCase], inputs: Sequence[str]
) -> dict[str, set[bool]]:
    """The values that each condition has on the inputs; the copy that returns them is beside the file's weights."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None) for name in names)
    with tempfile.NamedTemporaryFile(dir=draft.parent, suffix=".onnx") as file:
        onnx.save(model, file.name)
        session = open_session(file.name)
    seen: dict[str, set[bool]] = {name: set() for name in names}
    for case in cases:
        found = run_session(session, names, dict(zip(inputs, case.call.tensors, strict=True)))
        for name, value in zip(names, found, strict=True):
            seen[name].add(bool(value.any()))
    return seen
