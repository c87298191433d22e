"""Checkpoints of a `LightningModule` that trains a converted step.

Training needs nothing from here: ``training_step`` returns ``self.step(x, y)`` and ``configure_optimizers`` takes
``self.step.parameters()``.
"""

from __future__ import annotations

from typing import Any

from bpfx.errors import BpfxError
from bpfx.integrations import _beside
from bpfx.step import Step

STATE = "bpfx"
_AnyModule: Any = object


class PlainCheckpoints(_AnyModule):
    """Put before ``LightningModule``: checkpoints hold the plain model under the names that it has without bpfx.

    In ``checkpoint["state_dict"]`` the model's weights are ``model.…``, as in a LightningModule with
    ``self.model = net``; such a module loads the checkpoint, without bpfx. Heads, offsets and the position in the
    schedule are in ``checkpoint["bpfx"]``, so that ``trainer.fit(…, ckpt_path=…)`` continues. The module holds one
    step, under any name.

    Attributes:
        plain_name: what the model is called in checkpoints; set it on the class.

    Raises:
        BpfxError: no step or several; when loading, a checkpoint without its state, or one of other blocks.

    Example:
        >>> import lightning, torch, bpfx
        >>> class Classifier(PlainCheckpoints, lightning.LightningModule):
        ...     def __init__(self, net, batch):
        ...         super().__init__()
        ...         self.step = bpfx.convert(net, torch.nn.functional.cross_entropy, batch, blocks=2)
        ...
        ...     def training_step(self, batch, index):
        ...         return self.step(*batch)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.step.parameters(), lr=1e-3)
    """

    plain_name = "model"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: take heads and offsets out of the module's state."""
        super().on_save_checkpoint(checkpoint)
        name, step = self._step()
        state = checkpoint["state_dict"]
        checkpoint[STATE] = {key: state.pop(f"{name}.{key}") for key in _beside.beside(step)}
        _rename(state, f"{name}.{_beside.MODEL}", f"{self.plain_name}.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: put them back."""
        super().on_load_checkpoint(checkpoint)
        name, step = self._step()
        _beside.check(step, checkpoint.get(STATE), "the checkpoint")
        state = checkpoint["state_dict"]
        _rename(state, f"{self.plain_name}.", f"{name}.{_beside.MODEL}")
        state.update({f"{name}.{key}": value for key, value in checkpoint[STATE].items()})

    def _step(self) -> tuple[str, Step]:
        found = [(name, module) for name, module in self.named_modules() if isinstance(module, Step)]
        if len(found) != 1:
            raise BpfxError(f"PlainCheckpoints is for a module with one step; {type(self).__name__} has {len(found)}")
        return found[0]


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)
