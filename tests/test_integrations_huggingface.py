"""Hugging Face's Trainer with a converted step: gradients scaled as its own, exact resumes, plain models saved."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from oracles import assert_gradients, assert_same_bits, seed_all
from torch import Tensor, nn
from transformers import TrainingArguments
from twins import assert_close, case_of, fresh, snapshot
from zoo import Case

import bpfx
from bpfx.integrations.huggingface import StepTrainerMixin, Trainer

PLAIN = transformers.Trainer
Rows = list[dict[str, Tensor]]


def sentences(count: int, ignored: bool = True) -> Rows:
    """Token rows in which ever more labels are ignored, up to all of them."""
    words = torch.randint(zoo.WORDS, (count, zoo.LENGTH), generator=torch.Generator().manual_seed(5))
    labels = words.clone()
    for i, row in enumerate(labels):
        row[: i % 10 if ignored else 0] = -100
    named = zip(words, labels, torch.ones_like(words), strict=True)
    return [{"input_ids": w, "labels": y, "attention_mask": m} for w, y, m in named]


def options(folder: Path, **given: Any) -> TrainingArguments:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    usual = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "seed": 11}
    return TrainingArguments(str(folder), **{**quiet, **usual, **given})


def counted(step: Any) -> Any:
    """GPT-2's name does not tell the Trainer that its loss leaves out the first label of a row."""
    (step.model if isinstance(step, bpfx.Step) else step).loss_type = "ForCausalLM"
    return step


def gradients(trainer: transformers.Trainer) -> list[dict[str, Tensor]]:
    """The accumulated gradient of every update, by the model's names."""
    found: list[dict[str, Tensor]] = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parameters = trainer.model.named_parameters()
            found.append({n: p.grad.clone() for n, p in parameters if p.grad is not None})

    trainer.add_callback(Look())
    return found


@pytest.mark.filterwarnings("ignore:unstable offset")
@pytest.mark.parametrize("ragged", [False, True], ids=["equal labels", "ignored labels"])
def test_exact_steps_equal_the_plain_trainer(ragged: bool, tmp_path: Path) -> None:
    """Gradients, updates and reported losses; the last update of an epoch has one batch instead of three.

    A whole batch without a label that counts is among the ragged ones.
    """
    rows = sentences(28, ragged)
    if ragged:
        for row in rows[8:12]:
            row["labels"].fill_(-100)
    given = {"gradient_accumulation_steps": 3, "num_train_epochs": 2, "optim": "sgd", "max_grad_norm": 0.0}
    model = counted(case_of("gpt2", quiet=True).model)
    plain = PLAIN(model, options(tmp_path, **given), train_dataset=rows, eval_dataset=rows[:4])
    expected = gradients(plain)
    plain.train()
    step = counted(fresh("gpt2", offset=bpfx.Offset(period=1), quiet=True))
    trainer = Trainer(step, options(tmp_path, **given), train_dataset=rows, eval_dataset=rows[:4])
    found = gradients(trainer)
    trainer.train()
    assert len(found) == len(expected) == 6
    for a, e in zip(found, expected, strict=True):
        assert_gradients(a, e, 1e-5)
    assert_close(step.model, model, 1e-5)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_local_gradients_count_by_their_targets(tmp_path: Path) -> None:
    """Heads included: the sum over batches of their gradients, each by its share of the targets."""
    rows = sentences(12)
    step = counted(fresh("gpt2", quiet=True))
    batches = [torch.utils.data.default_collate(rows[i : i + 4]) for i in (0, 4, 8)]
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    assert len(set(counts)) > 1
    expected: dict[str, Tensor] = {}
    for batch, count in zip(batches, counts, strict=True):
        for name, grad in step.run_local(**batch).grads.items():
            expected[name] = expected.get(name, 0) + grad * (count / sum(counts))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    before = copy.deepcopy(dict(step.named_parameters()))
    given = {"gradient_accumulation_steps": 3, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    InOrder(step, options(tmp_path, **given, max_grad_norm=0.0), train_dataset=rows).train()
    named = {n.removeprefix("model.").replace("heads.", "bpfx.heads."): n for n in before}
    after = dict(step.named_parameters())
    assert_gradients({short: (before[n] - after[n]).detach() for short, n in named.items()}, expected, 1e-4)


@cache
def adapted() -> tuple[Case, bpfx.Step, dict[str, Any]]:
    def build(size: int) -> Case:
        case = zoo.gpt2(size)
        case.model = peft.get_peft_model(case.model, peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1))
        return case

    case = zoo.Entry("gpt2_lora", build, (), dtype=torch.float32).case(4)
    step = bpfx.convert(case.model, None, case.batch, blocks=3, offset=None)
    return case, step, snapshot(step)


def again(name: str, offset: bpfx.Offset) -> bpfx.Step:
    if name == "gpt2":
        return fresh("gpt2", offset=offset, dtype=torch.float32)
    _, first, state = adapted()
    step = bpfx.Step(first._compiler, offset)
    step.load_state_dict(state)
    return step


@pytest.mark.parametrize("name", ["gpt2", "gpt2 with LoRA"])
def test_resume_is_bit_for_bit(name: str, tmp_path: Path) -> None:
    """In the middle of a shuffled epoch and of a period, with dropout, accumulation, clipping and a schedule."""
    rows, offset = sentences(48), bpfx.Offset(period=5)
    given = {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
    }
    given |= {"save_strategy": "steps", "save_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "cosine"}

    def run(folder: Path, resume: str | None = None) -> tuple[bpfx.Step, dict[str, Any], list[Any]]:
        step = again(name, offset)
        seed_all(3)
        trainer = Trainer(step, options(folder, **given), train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        state = {"step": snapshot(step), "optimizer": trainer.optimizer.state_dict(), "random": torch.get_rng_state()}
        timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
        logs = [{k: v for k, v in entry.items() if k not in timed} for entry in trainer.state.log_history]
        return step, copy.deepcopy(state), logs

    step, expected, logs = run(tmp_path / "whole")
    assert step.iteration == 24 and len(step.diagnostics.refreshes) == 5
    step, found, resumed_logs = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_bits(found, expected)
    assert resumed_logs == logs

    saved = tmp_path / "whole" / "checkpoint-12"
    assert (saved / "bpfx.pt").is_file()
    if name == "gpt2":
        loaded = transformers.GPT2LMHeadModel.from_pretrained(saved)
        assert_same_bits(dict(loaded.state_dict()), dict(step.model.state_dict()))
    else:
        base = zoo.gpt2(4).model
        base.load_state_dict(_base(step.model))
        loaded = peft.PeftModel.from_pretrained(base, saved)
        assert_same_bits(dict(loaded.state_dict()), dict(step.model.state_dict()))
        assert {path.name for path in saved.glob("*.safetensors")} == {"adapter_model.safetensors"}


def _base(model: nn.Module) -> dict[str, Tensor]:
    """The base model's weights under its own names."""
    state = model.state_dict()
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): n for n in state if "lora_" not in n}
    return {short: state[n] for short, n in plain.items()}


LOADING = """
import sys
sys.modules["bpfx"] = None  # an import fails
sys.modules["torchvision"] = None  # not needed, and slow to import
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
rows = torch.load(sys.argv[2])
torch.save(model(**rows).logits, sys.argv[3])
"""


def test_a_saved_model_is_the_plain_model(tmp_path: Path) -> None:
    step, rows = fresh("gpt2", dtype=torch.float32), sentences(8)
    trainer = Trainer(step, options(tmp_path, max_steps=1), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    heads = {id(p) for p in step.heads.parameters()}
    stepped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert heads and heads <= stepped and stepped == {id(p) for p in step.parameters()}
    assert trainer.model is step.model and trainer.converted is step
    batch = torch.utils.data.default_collate(rows[:4])
    torch.save(batch, tmp_path / "batch.pt")
    with torch.no_grad():
        expected = step.model.eval()(**batch).logits
    arguments = [str(tmp_path / name) for name in ("final", "batch.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOADING, *arguments], check=True, timeout=120, capture_output=True)
    torch.testing.assert_close(torch.load(arguments[2], weights_only=True), expected)


def test_a_loss_outside_the_model_trains_and_evaluates(tmp_path: Path) -> None:
    """A plain module, and a loss of the caller's own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = case_of("mlp").model

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    x, y = case_of("mlp", 24).batch
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    model = Net()
    step = bpfx.convert(model, F.cross_entropy, ({"x": x[:4]}, y[:4]), blocks=2, offset=bpfx.Offset(period=1))
    plain = copy.deepcopy(model)
    given = {"max_steps": 4, "optim": "sgd", "label_names": ["labels"], "gradient_accumulation_steps": 2}
    right = lambda found: {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}  # noqa: E731
    made = options(tmp_path, **given, max_grad_norm=0.0)
    trainer = Trainer(step, made, train_dataset=rows, eval_dataset=rows, compute_metrics=right)
    trainer.train()
    loss = lambda output, labels, num_items_in_batch: F.cross_entropy(output, labels) / 2  # noqa: E731
    PLAIN(plain, made, train_dataset=rows, compute_loss_func=loss).train()
    assert_close(step.model, plain, 1e-5)
    metrics = trainer.evaluate()
    with torch.no_grad():
        output = step.model(x)
    assert metrics["eval_loss"] == pytest.approx(float(F.cross_entropy(output, y)), rel=1e-5)
    assert metrics["eval_right"] == pytest.approx(float((output.argmax(1) == y).float().mean()))


def test_the_mixin_goes_before_any_trainer(tmp_path: Path) -> None:
    class Mine(StepTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    step = fresh("gpt2", dtype=torch.float32)
    trainer = Mine(step, arguments, train_dataset=sentences(8), eval_dataset=sentences(4))
    trainer.train()
    assert step.iteration == 2 and trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert step.iteration == 4 and trainer.model_wrapped is step


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"gradient_checkpointing": True}, {}, "gradient_checkpointing has no effect on a converted step; leave it out"),
    ({"torch_compile": True}, {}, "torch_compile has no effect on a converted step; pass compile='inductor'"),
    ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha has no effect on a converted step; leave it out"),
    ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor has no effect .* pass the loss to bpfx.convert"),
    ({}, {"compute_loss_func": lambda *a, **k: None}, "compute_loss_func has no effect .* pass the loss to"),
]


@pytest.mark.parametrize(
    ("given", "more", "message"), REFUSED, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_options_that_would_do_nothing_are_refused(
    given: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(bpfx.BpfxError, match=message):
        Trainer(fresh("gpt2", dtype=torch.float32), options(tmp_path, **given), train_dataset=sentences(4), **more)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    rows, step = sentences(8), fresh("gpt2", dtype=torch.float32)
    with pytest.raises(bpfx.BpfxError, match="takes what bpfx.convert returned as its model; got a GPT2LMHeadModel"):
        Trainer(step.model, options(tmp_path))
    without_heads = torch.optim.SGD(step.model.parameters(), lr=0.1)
    trainer = Trainer(step, options(tmp_path), train_dataset=rows, optimizers=(without_heads, None))
    with pytest.raises(bpfx.BpfxError, match="the optimizer lacks the heads' parameters; make it from step.parameters"):
        trainer.train()
    given = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    plain = PLAIN(case_of("gpt2", dtype=torch.float32).model, options(tmp_path, **given), train_dataset=rows)
    plain.train()
    trainer = Trainer(step, options(tmp_path, **given), train_dataset=rows)
    with pytest.raises(bpfx.BpfxError, match="bpfx.pt does not exist, so heads and offsets cannot be restored"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(bpfx.BpfxError, match=r"converted on cpu, meta.*call model.to\('cpu'\) before bpfx.convert"):
        other = bpfx.Step(step._compiler, None)
        other.heads = copy.deepcopy(other.heads).to("meta")
        Trainer(other, options(tmp_path))
