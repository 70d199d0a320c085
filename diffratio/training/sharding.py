"""FSDP2: blocks sharded one by one, in checkpoints of the very form that one process writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn

from diffratio.backbones import Backbone

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer


def shard_(transformer: nn.Module, backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shards a transformer's parameters over processes, in place: each block in a unit, what is left in the root's.

    Keep ratios stay whole on every process: they are read outside the forward, and a projection needs all of them.

    Args:
        transformer: with or without a method applied.
        backbone: its family.
        mesh: one-dimensional mesh of all processes.
    """
    from torch.distributed.fsdp import fully_shard

    for index, block in enumerate(backbone.blocks(transformer)):
        if index not in backbone.root_blocks:
            fully_shard(block, mesh=mesh)
    ratios = {one for name, one in transformer.named_parameters() if name.startswith("keep_ratios")}
    # the root too is sharded again after a forward: averages and checkpoints between steps find shards everywhere
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True, ignored_params=ratios)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; all processes must ask together. Others are returned as they are."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """A full tensor sharded as another one is; no process needs to hear from the others."""
    if not _is_sharded(own) or _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    one: Any = own
    return distribute_tensor(tensor.to(own.device), one.device_mesh, one.placements, src_data_rank=None)


def gathered(document: Any, keep: bool) -> Any:
    """Nested data with every sharded tensor made whole, on the CPU.

    Args:
        document: dicts, lists, tuples and values; the same on all processes, which must call this together.
        keep: whether this process wants the result; elsewhere whole tensors are let go at once.

    Returns:
        The document; None stands for sharded tensors where they are not kept.
    """

    def gather(one: Any) -> Any:
        if not _is_sharded(one):
            return one
        full = whole(one.detach())
        return full.cpu() if keep else None

    return _mapped(gather, document)


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def _mapped(function: Callable[[Any], Any], document: Any) -> Any:
    if isinstance(document, Mapping):
        return {key: _mapped(function, one) for key, one in document.items()}
    if isinstance(document, list | tuple):
        return type(document)(_mapped(function, one) for one in document)
    return function(document)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all processes, with one checkpoint file as a single process would write it.

    Lightning's own file numbers the moments by the order of the module's parameters, and a plain optimizer by that of
    its groups; here both are the latter's, so that a job goes on with any number of processes and either strategy.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Before, as elsewhere: a frozen schedule changes what is trained."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the moments over when the optimizer is there."""
        return True

    def setup_environment(self) -> None:
        """All processes shard; none of them splits tensors."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state on the first process; all must ask together."""
        assert self.lightning_module is not None
        state = gathered(self.lightning_module.state_dict(), self.is_global_zero)
        return state if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Every process takes its shards of a whole state."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {key: like(one, own[key]) if key in own else one for key, one in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole moments on the first process, as a plain optimizer writes them."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = gathered(optimizer.state_dict(), self.is_global_zero)
        return state if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every process takes its shards of whole moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            state = {
                number: {
                    key: like(one, parameters[number]) if _shaped_as(one, parameters[number]) else one
                    for key, one in moments.items()
                }
                for number, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, read by every process: tensors stay on the disk until they are used."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, written by the first process."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)


def _shaped_as(value: Any, parameter: Tensor) -> bool:
    """Whether a value of an optimizer's state is a moment, not a count of steps."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
