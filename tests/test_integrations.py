"""Accelerate, Lightning, PEFT and a plain loop with a converted step: same gradients, exact resumes, plain models.

Hugging Face's Trainer is in test_integrations_huggingface.py, every adapter of PEFT in test_integrations_peft.py.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from oracles import assert_same_bits, seed_all
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from twins import case_of, fresh, snapshot
from zoo_hard import WIDTH

import bpfx
from bpfx.integrations.accelerate import plain_checkpoints
from bpfx.integrations.lightning import PlainCheckpoints

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = 44  # 11 batches of 4: with two to an update, the last one stands alone
CLIP = 0.5


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    """Accelerate keeps its state per process, and the first Accelerator's settings with it."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def data(name: str = "mlp") -> TensorDataset:
    x, y = case_of(name, ROWS).batch
    return TensorDataset(x, y)


def adamw(step: bpfx.Step) -> torch.optim.Optimizer:
    return torch.optim.AdamW(step.parameters(), lr=1e-2)


def by_hand(step: bpfx.Step, updates_at: set[int], scale: float) -> dict[str, Any]:
    """The loop that one writes: accumulate, clip, step. Returns the step's and the optimizer's state."""
    optimizer = adamw(step)
    for i, (x, y) in enumerate(DataLoader(data(), 4)):
        (step(x, y) / scale).backward()
        if i in updates_at:
            nn.utils.clip_grad_norm_(step.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return {"step": snapshot(step), "optimizer": optimizer.state_dict()}


EVERY_SECOND = {1, 3, 5, 7, 9, 10}  # both libraries step at the end of an epoch, too


# --- examples --------------------------------------------------------------------------------------------------------

SAID = {
    "plain_loop": "saved to runs/plain_loop",
    "huggingface_trainer": "saved and loaded: LlamaForCausalLM",
    "accelerate_loop": "test accuracy",
    "lightning_module": "accuracy",
    "peft_adapters": "test accuracy",
    "torch_compile": "saved after 188 steps",
    "mixed_precision": "offsets: {torch.float32}",
}


@pytest.mark.parametrize("name", SAID)
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / f"{name}.py"
    text = path.read_text("utf-8")
    assert f"    python examples/{name}.py" in text.split('"""')[1], "the launch line is at the top"
    assert len(text.splitlines()) < 70
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert SAID[name] in capsys.readouterr().out


# --- Accelerate ------------------------------------------------------------------------------------------------------


def prepared(step: bpfx.Step, rows: TensorDataset, plain: bool = True, **options: Any) -> tuple[Any, ...]:
    accelerator = Accelerator(cpu=True, **options)
    if plain:
        plain_checkpoints(accelerator)
    order = torch.Generator().manual_seed(3)
    loader = DataLoader(rows, 4, shuffle=bool(plain), generator=order)
    return accelerator, *accelerator.prepare(step, adamw(step), loader)


def accelerated(parts: tuple[Any, ...], batches: Any, save_after: int | None = None, folder: Any = None) -> None:
    accelerator, step, optimizer, _ = parts
    for i, (x, y) in enumerate(batches):
        with accelerator.accumulate(step):
            accelerator.backward(step(x, y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(step.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if i == save_after:
            accelerator.save_state(folder)


def test_accelerate_trains_as_a_loop_by_hand() -> None:
    offset = bpfx.Offset(period=3)
    expected = by_hand(fresh("mlp", offset=offset), EVERY_SECOND, 2)
    step = fresh("mlp", offset=offset)
    parts = prepared(step, data(), plain=False, gradient_accumulation_steps=2)
    assert parts[1] is step, "one process: prepare leaves the step as it is"
    accelerated(parts, parts[3])
    assert_same_bits({"step": snapshot(step), "optimizer": parts[2].state_dict()}, expected)
    assert parts[0].unwrap_model(parts[1]).model is step.model


@pytest.mark.parametrize("stop", [3, 5], ids=["right before a refresh", "between refreshes"])
def test_accelerate_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    """With dropout, BatchNorm and a shuffled epoch, in the middle of it."""
    offset, options = bpfx.Offset(period=4), {"gradient_accumulation_steps": 2}
    step = fresh("convnet", offset=offset)
    parts = prepared(step, data("convnet"), **options)
    seed_all(7)
    accelerated(parts, parts[3], stop, tmp_path)
    assert len(step.diagnostics.refreshes) >= 2
    expected = {"step": snapshot(step), "optimizer": parts[2].state_dict(), "random": torch.get_rng_state()}

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    step = fresh("convnet", offset=offset)
    parts = prepared(step, data("convnet"), **options)
    parts[0].load_state(tmp_path)
    assert step.iteration == stop + 1
    accelerated(parts, skip_first_batches(parts[3], stop + 1))
    assert_same_bits(
        {"step": snapshot(step), "optimizer": parts[2].state_dict(), "random": torch.get_rng_state()}, expected
    )


def test_accelerate_saves_plain_models_beside_their_heads(tmp_path: Path) -> None:
    steps = [fresh("mlp"), fresh("convnet")]
    accelerator = Accelerator(cpu=True)
    plain_checkpoints(accelerator)
    accelerator.prepare(*steps)
    accelerator.save_state(tmp_path)
    for step, name in zip(steps, ("model", "model_1"), strict=True):
        assert_same_bits(load_file(tmp_path / f"{name}.safetensors"), dict(step.model.state_dict()))
    heads = torch.load(tmp_path / "bpfx.pt", weights_only=True)
    assert heads.keys() == {n for n in steps[0].state_dict() if not n.startswith("model.")}
    assert {path.name for path in tmp_path.glob("bpfx*")} == {"bpfx.pt", "bpfx_1.pt"}
    expected = [snapshot(step) for step in steps]
    for step in steps:
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.zero_()
    accelerator.load_state(tmp_path)
    assert_same_bits([snapshot(step) for step in steps], expected)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "does not exist, so heads and offsets cannot be restored; resume from a checkpoint that was"),
        (_cut, "cannot be read"),
        (lambda path: torch.save({"a": 1}, path), "is no state of a step; resume from a checkpoint that"),
        (lambda path: torch.save(_without(path, "heads.0"), path), "is in the step only"),
        (lambda path: torch.save(_of_other_blocks(path), path), "this state belongs to 1 blocks"),
    ],
    ids=["no file", "cut off", "another file", "other heads", "other blocks"],
)
def test_a_checkpoint_without_its_state_is_refused(spoil: Callable, message: str, tmp_path: Path) -> None:
    step = fresh("mlp")
    accelerator = Accelerator(cpu=True)
    plain_checkpoints(accelerator)
    accelerator.prepare(step)
    accelerator.save_state(tmp_path)
    spoil(tmp_path / "bpfx.pt")
    before = snapshot(step)
    with pytest.raises(bpfx.BpfxError, match=message):
        accelerator.load_state(tmp_path)
    assert_same_bits(snapshot(step), before)


def _without(path: Path, prefix: str) -> dict[str, Any]:
    return {n: v for n, v in torch.load(path, weights_only=True).items() if not n.startswith(prefix)}


def _of_other_blocks(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=True)
    return state | {"_extra_state": state["_extra_state"] | {"blocks": ["all"]}}


# --- Lightning -------------------------------------------------------------------------------------------------------


class Plain(lightning.LightningModule):
    """What a user had before."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = case_of("mlp").model

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Converted(PlainCheckpoints, lightning.LightningModule):
    """And after."""

    def __init__(self, offset: bpfx.Offset | None = None) -> None:
        super().__init__()
        self.step = fresh("mlp", offset=offset)
        self.seen: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.step(*batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        assert not self.step.training
        loss = self.step(*batch)  # in eval mode a step is the plain model
        assert torch.equal(loss, F.cross_entropy(self.step.model(batch[0]), batch[1]))
        self.seen.append(float(loss))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.step)


def fit(module: lightning.LightningModule, folder: Path, ckpt_path: Any = None, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 1, "callbacks": [], **quiet, **options}
    options["callbacks"] += [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]
    trainer = lightning.Trainer(default_root_dir=folder, **options)
    trainer.fit(module, DataLoader(data(), 4), DataLoader(data(), 11), ckpt_path=ckpt_path)
    return trainer


def test_lightning_trains_as_a_loop_by_hand(tmp_path: Path) -> None:
    offset = bpfx.Offset(period=3)
    expected = by_hand(fresh("mlp", offset=offset), EVERY_SECOND, 2)
    module = Converted(offset)
    trainer = fit(module, tmp_path, accumulate_grad_batches=2, gradient_clip_val=CLIP)
    assert_same_bits({"step": snapshot(module.step), "optimizer": trainer.optimizers[0].state_dict()}, expected)
    assert module.seen


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    offset = bpfx.Offset(period=4)
    module = Converted(offset)
    trainer = fit(module, tmp_path, max_epochs=3)
    expected = {"step": snapshot(module.step), "optimizer": trainer.optimizers[0].state_dict()}
    module = Converted(offset)
    trainer = fit(module, tmp_path / "again", tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert module.step.iteration == 33 and trainer.global_step == 33
    assert_same_bits({"step": snapshot(module.step), "optimizer": trainer.optimizers[0].state_dict()}, expected)


def test_lightning_saves_the_module_without_bpfx(tmp_path: Path) -> None:
    module = Converted()
    fit(module, tmp_path)
    path = tmp_path / "epoch=0.ckpt"
    plain = Plain.load_from_checkpoint(path, map_location="cpu")
    assert_same_bits(dict(plain.model.state_dict()), dict(module.step.model.state_dict()))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == Plain().state_dict().keys()
    again = Converted.load_from_checkpoint(path, map_location="cpu")
    assert_same_bits(snapshot(again.step), snapshot(module.step))


def test_lightning_refuses_what_it_cannot_restore(tmp_path: Path) -> None:
    fit(Plain(), tmp_path, limit_val_batches=0)
    with pytest.raises(bpfx.BpfxError, match="the checkpoint is no state of a step"):
        fit(Converted(), tmp_path, tmp_path / "epoch=0.ckpt")
    module = Converted()
    module.other = fresh("convnet")
    with pytest.raises(bpfx.BpfxError, match="a module with one step; Converted has 2"):
        fit(module, tmp_path)


def test_lightning_copies_no_step(tmp_path: Path) -> None:
    """Averaging callbacks copy the module. The message says what can be copied."""
    with pytest.raises(bpfx.BpfxError, match="a step cannot be copied; copy step.model and convert it"):
        fit(Converted(), tmp_path, callbacks=[StochasticWeightAveraging(1e-2)])


# --- without bpfx ----------------------------------------------------------------------------------------------------

LOADING = """
import sys
sys.modules["bpfx"] = None  # an import fails
sys.modules["torchvision"] = None  # not needed, and slow to import
import torch
from safetensors.torch import load_file
from torch import nn

folder = sys.argv[1]
torch.set_default_dtype(torch.float32)
hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)]
net = nn.Sequential(*hidden, nn.Linear(WIDTH, 5))
x = torch.load(f"{folder}/x.pt")
found = {}
state = torch.load(f"{folder}/epoch=0.ckpt", weights_only=True)["state_dict"]
for name, weights in (
    ("lightning", {key.removeprefix("model."): value for key, value in state.items()}),
    ("accelerate", load_file(f"{folder}/model.safetensors")),
    ("loop", torch.load(f"{folder}/model.pt", weights_only=True)),
):
    net.load_state_dict(weights)
    found[name] = net(x)
torch.save(found, f"{folder}/found.pt")
"""


def test_saved_models_load_without_bpfx(tmp_path: Path) -> None:
    module = Converted()
    fit(module, tmp_path)
    step, x = module.step, data().tensors[0]
    accelerator = Accelerator(cpu=True)
    plain_checkpoints(accelerator)
    accelerator.prepare(step)
    accelerator.save_state(tmp_path)
    torch.save(step.model.state_dict(), tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", LOADING.replace("WIDTH", str(WIDTH)), str(tmp_path)], check=True, timeout=120)
    expected = step.model(x)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == {"lightning", "accelerate", "loop"}
    for value in found.values():
        torch.testing.assert_close(value, expected)


# --- imports ---------------------------------------------------------------------------------------------------------


def test_importing_bpfx_imports_none_of_the_libraries() -> None:
    code = (
        "import sys, bpfx, bpfx.integrations; "
        "print([m for m in ('transformers', 'accelerate', 'lightning', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"
