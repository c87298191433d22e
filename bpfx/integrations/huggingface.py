"""`transformers.Trainer` with a converted step: the Trainer's own loop, options, logs and checkpoints.

The Trainer keeps the plain model as its ``model``: it evaluates and saves that. What it trains is the step, so heads
are in the optimizer and in the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.integrations import _beside
from bpfx.passes.batch import call_model, loss_of
from bpfx.step import Step

STATE = "bpfx.pt"
IGNORED = -100  # the label that transformers leaves out of losses
_AnyTrainer: Any = object


class StepTrainerMixin(_AnyTrainer):
    """Put before a ``transformers.Trainer`` (or one of its subclasses): takes a step where that takes a model.

    Training calls the step, evaluation and ``predict`` call the plain model. A loss counts by its share of the
    targets of all accumulated batches, as the Trainer's models count it. Every batch is one iteration of the offset's
    schedule. Checkpoints hold the plain model, and beside it, in ``bpfx.pt``, the heads, the offsets and the position
    in the schedule, so that ``train(resume_from_checkpoint=…)`` continues bit for bit.

    Args:
        model: what :func:`bpfx.convert` returned, converted on the device on which the Trainer trains. Without a
            ``loss_fn``, from a batch as the collator makes it. With one, from ``({inputs}, labels)``: the loss must be
            a mean over the labels that are not -100, and it also evaluates.
        arguments, options: those of the Trainer.

    Attributes:
        converted: the step.
        model: the plain model.

    Raises:
        BpfxError: not a step, or an option that has no effect on one.

    Example:
        >>> class Seq2SeqTrainer(StepTrainerMixin, transformers.Seq2SeqTrainer):
        ...     pass
    """

    def __init__(self, model: Step, *arguments: Any, **options: Any) -> None:
        if not isinstance(model, Step):
            raise BpfxError(f"this Trainer takes what bpfx.convert returned as its model; got a {type(model).__name__}")
        self.converted = model
        made_on = {p.device for p in model.parameters()}
        super().__init__(model.model, *arguments, **options)
        self._refuse_options()
        if made_on != {self.args.device}:
            raise BpfxError(
                f"the step was converted on {', '.join(sorted(map(str, made_on)))}, and the Trainer trains on "
                f"{self.args.device}; call model.to({str(self.args.device)!r}) before bpfx.convert"
            )

    def _refuse_options(self) -> None:
        """What acts on the model's forward cannot act on programs that were made of it before."""
        args, own_loss = self.args, self.converted._compiler.loss_fn is not None
        inside = "bpfx.convert(model, loss_fn, ({inputs}, labels))"
        refused: list[tuple[Any, str, str]] = [
            (args.n_gpu > 1, f"{args.n_gpu} GPUs in one process", "start one process per GPU with torchrun"),
            (self.is_deepspeed_enabled, "deepspeed", "leave it out"),
            (self.is_fsdp_enabled, "fsdp", "leave it out"),
            (args.torch_compile, "torch_compile", "pass compile='inductor' to bpfx.convert"),
            (args.gradient_checkpointing, "gradient_checkpointing", "leave it out, or enable it before bpfx.convert"),
            (args.use_liger_kernel, "use_liger_kernel", "leave it out, or apply it before bpfx.convert"),
            (args.neftune_noise_alpha, "neftune_noise_alpha", "leave it out"),
            (self.compute_loss_func, "compute_loss_func", f"pass the loss to {inside}"),
            (args.label_smoothing_factor and not own_loss, "label_smoothing_factor", f"pass the loss to {inside}"),
            (own_loss and len(self.label_names) != 1, f"label_names={self.label_names}", "name the one label"),
        ]
        for given, name, instead in refused:
            if given:
                raise BpfxError(f"{name} has no effect on a converted step; {instead}")

    # --- training -----------------------------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """What is trained is the step, in whatever Accelerate puts around it; what is evaluated is the plain model."""
        if not training:
            return super()._wrap_model(model, training, dataloader)
        unwrapped = self.accelerator.unwrap_model(model)  # the step already where train() is called again
        return self.accelerator.prepare_model(model if unwrapped is self.converted else self.converted)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer over the model's parameters and the heads'."""
        optimizer = super().create_optimizer(self.converted)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(p.requires_grad and id(p) not in known for p in self.converted.heads.parameters()):
            raise BpfxError("the optimizer lacks the heads' parameters; make it from step.parameters()")
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch: of the step in training, of the plain model otherwise. Arguments as the Trainer's."""
        step = self.accelerator.unwrap_model(model)
        own_loss = self.converted._compiler.loss_fn
        if step is not self.converted:
            with self.accelerator.autocast():  # in training the Trainer wraps the step in it, not the plain model
                if own_loss is None:
                    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                loss, outputs = call_model(model, own_loss, *self._as_call(inputs))
                # The Trainer takes a sequence for a tuple that begins with the loss, and a tensor is one.
                named = outputs if isinstance(outputs, (Mapping, tuple)) else {"logits": outputs}
                return (loss, named) if return_outputs else loss
        if num_items_in_batch is None:  # training_step divides by the number of batches then
            share: Tensor | float = 1.0
        else:
            count = _targets(inputs, self._loss_shifts_labels)
            if not int(count):
                return self._nothing(inputs, return_outputs)
            share = count / num_items_in_batch
            if self.args.average_tokens_across_devices:
                share = share * self.accelerator.num_processes
        args, kwargs = self._as_call(inputs)
        outputs = model(*args, **kwargs)
        loss = loss_of(outputs) * share
        return (loss, outputs if own_loss is None else {}) if return_outputs else loss

    def _as_call(self, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.converted._compiler.loss_fn is None:
            return (), dict(inputs)
        (label,) = self.label_names
        return ({name: value for name, value in inputs.items() if name != label}, inputs[label]), {}

    def _nothing(self, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        """A batch without a target that counts: no gradient. Its mean would be 0/0."""
        if self.accelerator.num_processes > 1:
            raise BpfxError("every label of this batch is ignored, so it has no loss to synchronise; leave it out")
        loss = torch.zeros((), device=self.args.device, requires_grad=True)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, self.model(**inputs) if self.converted._compiler.loss_fn is None else {}

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            _beside.save(self.converted, Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _beside.load(self.converted, Path(checkpoint) / STATE)
        super()._load_optimizer_and_scheduler(checkpoint)


class Trainer(StepTrainerMixin, transformers.Trainer):
    """:class:`transformers.Trainer` for a converted step.

    Arguments are those of :class:`StepTrainerMixin` and of the Trainer; see there.

    Example:
        >>> import tempfile, torch, bpfx
        >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
        >>> ids = torch.randint(0, 53, (8, 9))
        >>> data = [{"input_ids": row, "labels": row} for row in ids]
        >>> config = GPT2Config(vocab_size=53, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False)
        >>> step = bpfx.convert(GPT2LMHeadModel(config), None, {"input_ids": ids, "labels": ids}, blocks=2)
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
        ...     options = TrainingArguments(folder, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        ...     trainer = Trainer(step, options, train_dataset=data)
        ...     trainer.train().global_step
        {...}
        2
    """


def _targets(inputs: Mapping[str, Any], shifted: bool) -> Tensor:
    """The targets of one batch that count, counted as the Trainer counts those of all accumulated ones."""
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    else:
        labels = inputs["labels"][..., 1:] if shifted else inputs["labels"]
    return labels.ne(IGNORED).sum()
