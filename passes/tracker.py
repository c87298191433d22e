"""Which module an exception came from while a model was traced, and what its forward has re-registered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bpfx.passes.graph import module_name


class ModuleTracker:
    """Knows the innermost module in whose forward an exception passed."""

    def __init__(self, program: nn.Module) -> None:
        self.paths = {id(m): path for path, m in program.named_modules()}
        self.program = program
        self.stack: list[str] = []
        self.changed: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleTracker:
        module = nn.modules.module
        self._handles = [
            module.register_module_forward_pre_hook(lambda m, args: self._push(m)),
            module.register_module_forward_hook(lambda m, args, output: self._pop(m)),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _push(self, m: nn.Module) -> None:
        if id(m) in self.paths:
            self.stack.append(self.paths[id(m)])

    def _pop(self, m: nn.Module) -> None:
        if id(m) in self.paths and self.stack:
            self.stack.pop()

    @contextmanager
    def slots_restored(self) -> Iterator[None]:
        """Put back what a module's forward re-registered while it was traced, and remember who did it."""
        before = {p: (m, _slots(m)) for p, m in self.program.named_modules()}
        try:
            yield
        finally:
            for path, (module, slots) in before.items():
                for kind, own in slots.items():
                    now = module.__dict__ if kind == "" else module.__dict__[kind]
                    tensors = {k: v for k, v in now.items() if isinstance(v, Tensor)}
                    if {k: id(v) for k, v in tensors.items()} != {k: id(v) for k, v in own.items()}:
                        self.changed.append(path)
                        for key in tensors.keys() - own.keys():
                            del now[key]
                        now.update(own)

    def culprit(self) -> str:
        return module_name(self.stack[-1] if self.stack else next(iter(self.changed), ""))


def _slots(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    kinds = {"": module.__dict__, "_parameters": module._parameters, "_buffers": module._buffers}
    return {kind: {k: v for k, v in slots.items() if isinstance(v, Tensor)} for kind, slots in kinds.items()}
