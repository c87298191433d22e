"""Parameters that ``fully_shard`` has divided among processes: whole for as long as a block runs, divided otherwise.

The block programs look their weights up by name and never call the model, so the hooks of FSDP2 do not run. The step
does their work, by the public means of DTensor: before a block its parameters are gathered, after it its gradients are
averaged and divided again, and the optimizer sees divided parameters with divided gradients as ever.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bpfx._gradients import Grads, merged
from bpfx._parallel import Pending, Ranks
from bpfx._serial import Piece, local_sweep
from bpfx._simulate import singly
from bpfx.errors import BpfxError
from bpfx.passes.graph import HEADS

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from bpfx._variant import Variant
    from bpfx.step import Step

_known: weakref.WeakKeyDictionary[nn.Module, Ranks] = weakref.WeakKeyDictionary()


def is_divided(tensor: object) -> bool:
    """Whether this is a tensor of which every process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_divided(model: nn.Module, words: str) -> None:
    """Raise if a parameter of the model is divided among processes.

    Args:
        model: any module.
        words: what is refused, and what would work.
    """
    for name, parameter in model.named_parameters():
        if is_divided(parameter):
            raise BpfxError(f"the parameter {name!r} is divided among processes (fully_shard, a DTensor): {words}")


def shards_of(step: Step) -> Shards | None:
    """How a step's parameters are divided; ``None`` where they are whole.

    Raises:
        BpfxError: a way of dividing them, or a kind of step, that is not built.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    words = "heads stay whole; call fully_shard on modules of step.model only, not on the step"
    if fsdp is not None and isinstance(step, fsdp.FSDPModule):
        raise BpfxError(f"the step itself was given to fully_shard: {words}")
    refuse_divided(step.heads, words)
    weights = step._compiler.weights
    names = [n for n in weights.parameter_names if is_divided(weights[n])]
    if not names:
        return None
    _check(step, names)
    ranks = _known.get(step)
    if ranks is None:
        first: Any = weights[names[0]]
        ranks = Ranks(step, first.device_mesh.get_group(), by_rank=True)
        ranks.check_alike()
        for tensor in (*step.heads.parameters(), *step.heads.buffers()):
            dist.broadcast(tensor.detach(), group=ranks.group, group_src=0)
        _known[step] = ranks
    return Shards(step, ranks, names)


def _check(step: Step, names: list[str]) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

    weights = step._compiler.weights
    if step.offset is not None:
        raise BpfxError(
            "offsets and exact steps are not built for parameters that fully_shard has divided; convert with "
            "offset=None, or use DistributedDataParallel or BlockTrainer(…, data_parallel=True)"
        )
    opaque = step._compiler.main.captured.graph.opaque
    if opaque:
        raise BpfxError(
            f"{next(iter(opaque)) or 'the model'} runs as itself, so its parameters cannot be divided by fully_shard; "
            "use DistributedDataParallel or BlockTrainer(…, data_parallel=True)"
        )
    divided = {path: m for path, m in step.model.named_modules() if isinstance(m, FSDPModule)}
    for name in names:
        parameter: Any = weights[name]
        mesh, placements = parameter.device_mesh, parameter.placements
        under = any(not path or name.startswith(f"{path}.") for path in divided)
        if not under or mesh.ndim != 1 or not isinstance(placements[0], Shard):
            raise BpfxError(
                f"{name} is a DTensor with {placements} over a mesh of {mesh.ndim} dimensions; only what fully_shard "
                "makes over one dimension of data parallel is supported: no tensor parallel, no hybrid sharding"
            )
        if parameter.device.type != mesh.device_type:
            raise BpfxError(f"{name} is kept on {parameter.device} by an offload policy, which is not supported")
    for path, module in divided.items():
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        if policy is not None and (policy.param_dtype is not None or policy.reduce_dtype is not None):
            raise BpfxError(f"the MixedPrecisionPolicy of {path or 'the model'} is not applied; use torch.autocast")


class Shards:
    """The divided parameters of one step.

    Args:
        step: whose they are.
        ranks: the processes.
        names: of the divided parameters.
    """

    def __init__(self, step: Step, ranks: Ranks, names: Iterable[str]) -> None:
        self.step, self.ranks, self.names = step, ranks, set(names)
        self._whole: dict[str, Tensor] = {}

    def run_local(self, variant: Variant, tensors: Any, keep: frozenset[str]) -> tuple[Piece, Grads, list[Tensor]]:
        """One local step: the piece with its loss, divided gradients, and the local losses of the blocks that train.

        Args:
            variant: the programs.
            tensors: the batch.
            keep: values that the caller wants of the piece.
        """
        piece = Piece.of(variant, tensors, use=self._use)
        piece.kept = keep
        parts, losses = [], []
        with self.step._compiler.weights.override(self._whole):
            for _, grads, loss in local_sweep([piece], singly(len(variant.stages))):
                parts.append(self._divided(grads))
                losses += [loss] if loss is not None else []
        self._whole.clear()
        found = merged(parts)
        return piece, {n: self._as_dtensor(n, g) if n in self.names else g for n, g in found.items()}, losses

    def _use(self, names: Iterable[str], ahead: Iterable[str]) -> None:
        """Gather what is needed now; let go of what is needed neither now nor next."""
        wanted = sorted(self.names.intersection(names))
        for name in self._whole.keys() - wanted - set(ahead):
            del self._whole[name]
        for name in wanted:
            if name not in self._whole:
                parameter = self._parameter(name)
                with torch.no_grad():
                    whole = parameter.full_tensor()
                self._whole[name] = whole.detach().requires_grad_(parameter.requires_grad)

    def _parameter(self, name: str) -> DTensor:
        slots, key = self.step._compiler.weights.slot(name)
        found: DTensor = slots[key]
        return found

    def _divided(self, grads: Grads) -> Grads:
        """The mean over the ranks of a block's gradients, of divided parameters this rank's part of it."""
        from torch.distributed.tensor import DTensor, Partial

        found: Grads = {}
        for name in [n for n in grads if n in self.names]:
            like = self._parameter(name)
            own = DTensor.from_local(grads.pop(name), like.device_mesh, [Partial("avg")], run_check=False)
            found[name] = own.redistribute(placements=like.placements).to_local()
        layout = [(n, self.ranks.like(n) if n.startswith(HEADS) else g) for n, g in grads.items()]
        return found | Pending(self.ranks.group, layout, grads, 1 / self.ranks.size).wait()

    def _as_dtensor(self, name: str, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self._parameter(name)
        made: Tensor = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return made
