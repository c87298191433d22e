"""`accelerate.Accelerator.save_state` with a converted step.

Training needs nothing from here: ``accelerator.prepare(step, optimizer, loader)``, ``accumulate``, ``backward`` and
``clip_grad_norm_`` work on a step as on any module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bpfx.integrations import _beside
from bpfx.step import Step

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]


def plain_checkpoints(accelerator: Accelerator) -> None:
    """Let ``save_state`` write plain models, and ``load_state`` read them; call it once, before either.

    ``model.safetensors`` then holds the plain model under its own names. Heads, offsets and the position in the
    schedule go to ``bpfx.pt`` beside it (``bpfx_1.pt`` for a second step, and so on).

    Without this, ``save_state`` fails: safetensors holds tensors only, and a step's state has a schedule in it.

    Args:
        accelerator: prepares the steps, before or after this call. Not with FSDP or DeepSpeed, which save otherwise.

    Raises:
        BpfxError: at ``load_state``, for a folder that was saved without this or for other blocks.

    Example:
        >>> import tempfile, torch, bpfx
        >>> from accelerate import Accelerator
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
        >>> accelerator = Accelerator(cpu=True)
        >>> plain_checkpoints(accelerator)
        >>> step = bpfx.convert(net, torch.nn.functional.cross_entropy, (x, y), blocks=2)
        >>> step, optimizer = accelerator.prepare(step, torch.optim.SGD(step.parameters(), lr=0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = accelerator.save_state(folder)
        ...     accelerator.load_state(folder)
    """

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        for i, step in _steps(models):
            weights[i] = step.model.state_dict()
            if accelerator.is_main_process:
                _beside.save(step, _path(folder, i))

    def load(models: list[nn.Module], folder: str) -> None:
        for i, step in _steps(models):
            _beside.load(step, _path(folder, i))
            models[i] = step.model  # what Accelerate reads the weights into

    def _steps(models: list[nn.Module]) -> list[tuple[int, Step]]:
        plain = [accelerator.unwrap_model(model) for model in models]
        return [(i, model) for i, model in enumerate(plain) if isinstance(model, Step)]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _path(folder: str, index: int) -> Path:
    return Path(folder) / (f"bpfx_{index}.pt" if index else "bpfx.pt")
