"""A step inside of DistributedDataParallel: which ranks it belongs to, and what its hooks are to see."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bpfx._gradients import Grads
from bpfx._parallel import Ranks
from bpfx.errors import BpfxError
from bpfx.passes.graph import HEADS

if TYPE_CHECKING:
    from bpfx.step import Step

# By step, the wrapper in which it was called last and its ranks; every rank checks at the same call.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], Ranks]] = weakref.WeakKeyDictionary()


class OnOneDevice(nn.Module):
    """A module that cannot be replicated within a process."""

    def _replicate_for_data_parallel(self) -> Any:
        raise BpfxError(
            "nn.DataParallel copies a module to other devices, which a step cannot follow; start one process for each "
            "device with torchrun, and use DistributedDataParallel or BlockTrainer(…, data_parallel=True)"
        )


def ranks_of_ddp(step: Step) -> Ranks | None:
    """The ranks around a call of the step inside of DistributedDataParallel's; ``None`` outside of it.

    Raises:
        BpfxError: what this kind of step cannot do under DistributedDataParallel.
    """
    # What DDP offers to those who cooperate with it: the module whose forward is running.
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None:
        return None
    opaque = step._compiler.main.captured.graph.opaque
    if ddp.static_graph and opaque and step.offset is not None:
        raise BpfxError(
            f"DistributedDataParallel(static_graph=True) counts the gradients of {next(iter(opaque)) or 'the model'}, "
            "which runs as itself, once more in exact steps and refreshes; leave static_graph out"
        )
    if ddp._join_config.enable and step.offset is not None:
        raise BpfxError(
            "under torch.distributed.algorithms.join a rank that has run out of batches cannot take part in a refresh; "
            "give every rank the same number of batches, or convert with offset=None"
        )
    if ddp.process_group.size() == 1:
        return None
    around, ranks = _known.get(step, (None, None))
    if ranks is None or around is None or around() is not ddp:
        ranks = Ranks(step, ddp.process_group, by_rank=True)
        ranks.check_alike()
        _known[step] = weakref.ref(ddp), ranks
    return ranks


def for_limits(step: Step, grads: Grads) -> Grads:
    """Local gradients as ``Offset(clip=…)`` compares them with Δ: their mean over the ranks, as Δ is one."""
    if step._ranks is None or step.offset is None or step.offset.clip is None:
        return grads
    return step._ranks.mean(grads)


@contextmanager
def aside(step: Step, kind: str) -> Iterator[None]:
    """Around an exact step or a refresh under DistributedDataParallel: its hooks do not see what is computed inside.

    These steps take gradients one by one, as hooks do, and DistributedDataParallel would count its own being called.
    So they run on other leaves that share the parameters' memory.
    """
    if step._ranks is None or kind == "local":
        yield
        return
    compiler = step._compiler
    # An opaque module runs as itself, and may register its parameters anew, which no stand-in would survive.
    opaque = tuple(f"{path}." if path else "" for path in compiler.main.captured.graph.opaque)
    names = [n for n in step._trainable if not n.startswith(opaque)]
    named = {n: compiler.weights[n] for n in names}
    if compiler.backend == "eager":  # compiled heads take their gradients all at once
        named |= {f"{HEADS}{n}": p for n, p in step.heads.named_parameters()}
    with compiler.weights.override({n: p.detach().requires_grad_() for n, p in named.items()}):
        yield
