"""An adapted model whose base is sharded, and what all ranks do together with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adapter_compiler.adapters.parameters.checksum import compute_checksum
from adapter_compiler.adapters.parameters.sharded import gather_full
from adapter_compiler.errors import ConfigError, DistributedError
from adapter_compiler.integrations.fsdp.agreement import (
    gather_on_all,
    is_first,
    run_on_every_rank,
    run_on_first_rank,
)
from adapter_compiler.integrations.fsdp.gathering import count_local_bytes, gather_folded
from adapter_compiler.integrations.fsdp.gradients import (
    GradientAverage,
    average_losses,
    measure_norm,
    scale_gradients,
)
from adapter_compiler.integrations.fsdp.state.load_state import load_sharded_state
from adapter_compiler.integrations.fsdp.state.save_state import save_sharded_state
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.exporting.export import export_onnx
from adapter_compiler.onnx.verification.report import ExportReport
from adapter_compiler.saving.adapters import find_saved_tensors, save_adapters
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.resuming.state_file import Stateful

#: The arguments of an optimizer step.
_Step = tuple[tuple[Any, ...], dict[str, Any]]


class ShardedAdapters:
    """An adapted model whose base is sharded; :func:`shard` makes it. Train ``adapted`` as ever.

    Every rank must call each method, but ``detach``. If it fails on one rank, it raises on all of them.

    Attributes:
        adapted: the model.
        mesh: the ranks.
        bytes_whole: memory of the base's parameters before, in bytes.
        bytes_here: what this rank keeps of them, in bytes.
    """

    def __init__(self, adapted: AdaptedModel, mesh: DeviceMesh, skeleton: nn.Module, bytes_whole: int) -> None:
        """Hook the average of gradients to optimizer steps."""
        self.adapted = adapted
        self.mesh = mesh
        self.bytes_whole, self.bytes_here = bytes_whole, count_local_bytes(adapted.module)
        self._skeleton = skeleton
        self._group = mesh.get_group()
        self._gradients = GradientAverage(self._group)
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Take the hooks off optimizer steps and parameters."""
        self._handle.remove()
        self._gradients.detach()

    def sync_gradients(self) -> None:
        """Average the adapters' gradients over the ranks; each optimizer step does it if it has not been done since.

        Call it where something looks at gradients before the step, such as a GradScaler's ``unscale_`` and ``step``.
        """
        self._gradients.average(self._find_trained())

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over adapters and fully trained parameters, averaged over the ranks.

        Returns:
            The norm before, the same on every rank.

        Raises:
            RuntimeError: ``error_if_nonfinite``, and the norm is inf or nan; no gradient is scaled.
        """
        self.sync_gradients()
        gradients = [p.grad for p in self.adapted.trainable_parameters() if p.grad is not None]
        total = measure_norm(gradients, norm_type)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"the norm of the gradients is {float(total)}, expected a finite number; skip this step")
        scale_gradients(gradients, (max_norm / (total + 1e-6)).clamp(max=1.0))  # the constant of torch's function
        return total

    def assert_same_adapters(self) -> None:
        """Check that the adapters of all ranks are equal bit for bit, as they are unless something has changed one.

        Raises:
            DistributedError: they differ; the message names the first parameter.
        """
        names = [name for name, p in self.adapted.adapters.named_parameters()]
        parameters = self.adapted.adapters.parameters()
        sums = run_on_every_rank(
            self._group, lambda: [f"{list(p.shape)} {compute_checksum(p.detach())}" for p in parameters]
        )
        found = gather_on_all(self._group, sums)
        for rank, other in enumerate(found):
            if odd := [name for name, mine, first in zip(names, other, found[0], strict=False) if mine != first]:
                raise DistributedError(
                    f"{odd[0]} on rank {rank} is not that of rank 0, expected the same adapters on every rank; step "
                    "with an optimizer that holds them on every rank, and change them on none alone"
                )

    def save(self, directory: str | Path) -> Path | None:
        """Write the active adapter as :meth:`AdaptedModel.save` does, on rank 0 of the mesh; ``None`` elsewhere.

        Fully trained parameters are gathered.

        Raises:
            DistributedError: the adapters differ between ranks, or another rank failed.
            OSError: the folder cannot be written.
        """
        self.assert_same_adapters()
        tensors = {name: gather_full(tensor.detach()) for name, tensor in find_saved_tensors(self.adapted).items()}
        return run_on_first_rank(self._group, lambda: save_adapters(self.adapted, directory, tensors=tensors))

    def save_training_state(
        self,
        directory: str | Path,
        optimizer: torch.optim.Optimizer,
        budget: RankBudget | None = None,
        **others: Stateful,
    ) -> Path:
        """Write everything that a step depends on by ``torch.distributed.checkpoint``; every rank writes its part.

        See :func:`adapter_compiler.integrations.fsdp.state.save_state.save_sharded_state`.
        """
        self.assert_same_adapters()
        return save_sharded_state(directory, self.adapted, optimizer, budget, self._group, others)

    def load_training_state(
        self,
        directory: str | Path,
        optimizer: torch.optim.Optimizer,
        budget: RankBudget | None = None,
        **others: Stateful,
    ) -> None:
        """Resume from :meth:`save_training_state`, on any number of ranks.

        See :func:`adapter_compiler.integrations.fsdp.state.load_state.load_sharded_state`.
        """
        load_sharded_state(directory, self.adapted, optimizer, budget, **others)

    def fold(self, *, gather: str = "rank0") -> nn.Module | None:
        """The user's own model with every ΔW merged, as :meth:`AdaptedModel.fold`, gathered weight by weight.

        Args:
            gather: ``"rank0"`` gives it to rank 0 of the mesh, on the CPU, and ``None`` to the others; ``"all"`` gives
                it to every rank.

        Raises:
            ConfigError: ``gather`` is neither.
            DistributedError: the adapters differ between ranks, or another rank failed.
        """
        if gather not in ("rank0", "all"):
            raise ConfigError(f"fold(gather={gather!r}): expected 'rank0' or 'all'; for example gather='rank0'")
        self.assert_same_adapters()
        is_mine = gather == "all" or is_first(self._group)
        return gather_folded(self.adapted, self._skeleton, self._group, is_mine=is_mine)

    def export_onnx(
        self,
        path: str | Path,
        example_args: Sequence[Any] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        opset: int | None = None,
    ) -> ExportReport | None:
        """Fold, and let rank 0 export and verify the file; ``None`` elsewhere.

        See :func:`adapter_compiler.export_onnx`.

        Args:
            path: the file to write.
            example_args: positional arguments of one call, on the CPU.
            example_kwargs: keyword arguments of one call, on the CPU.
            opset: the ONNX operator set.
        """
        merged = self.fold()

        def export() -> ExportReport:
            assert merged is not None
            return export_onnx(merged, path, example_args, example_kwargs, opset=opset)

        return run_on_first_rank(self._group, export)

    def _find_trained(self) -> list[nn.Parameter]:
        """The adapters' parameters that train, in the same order on every rank."""
        return [parameter for parameter in self.adapted.adapters.parameters() if parameter.requires_grad]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> _Step | None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not (stepped := [parameter for parameter in self._find_trained() if id(parameter) in held]):
            return None
        self._gradients.average_before_step(self._find_trained(), stepped)

        def wrap(value: Any) -> Any:
            return self._average_after(value, stepped) if callable(value) else value

        values = (*args[1:], *kwargs.values())
        if not any(map(callable, values)):
            return None
        return (*args[:1], *map(wrap, args[1:])), {name: wrap(value) for name, value in kwargs.items()}

    def _average_after(self, closure: Callable[..., Any], stepped: Sequence[nn.Parameter]) -> Callable[..., Any]:
        """A closure that leaves averaged gradients and returns the average loss."""

        def run(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self._gradients.average_before_step(self._find_trained(), stepped)
            return average_losses(result, self._group)

        return run
