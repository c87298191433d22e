"""bpfx trains any PyTorch model in a fraction of the memory.

A graph compiler cuts the model into blocks, gives each an auxiliary head and a stop-gradient, and emits two steps over
the same parameters: a local step and a BP step. ``bpfx.convert`` returns them as one drop-in step.
"""

import os

from bpfx import _torchvision

_torchvision.ensure()  # before anything imports torchvision, timm, peft or transformers

from bpfx import _logging, checkpoint, logs, losses, memory, theory  # noqa: E402
from bpfx.audit import audit  # noqa: E402
from bpfx.convert import convert, plan  # noqa: E402
from bpfx.errors import BpfxError, BpfxWarning  # noqa: E402
from bpfx.offset import Offset  # noqa: E402
from bpfx.step import Step  # noqa: E402
from bpfx.trainer import BlockTrainer  # noqa: E402

if setting := os.environ.get(_logging.VARIABLE):
    _logging.configure(setting)

__all__ = [
    "BlockTrainer",
    "BpfxError",
    "BpfxWarning",
    "Offset",
    "Step",
    "audit",
    "checkpoint",
    "convert",
    "logs",
    "losses",
    "memory",
    "plan",
    "theory",
]
