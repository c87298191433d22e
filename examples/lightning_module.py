"""Lightning, automatic optimisation: training_step returns step(x, y).

    python examples/lightning_module.py

Fashion-MNIST images, bundled; a few seconds on a CPU.
"""

import bpfx  # first: it stands in for operators that some builds of torchvision lack

# isort: split

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import bpfx.data
from bpfx.integrations.lightning import PlainCheckpoints


class Classifier(PlainCheckpoints, L.LightningModule):
    """PlainCheckpoints: checkpoints hold the plain model, as that of a module with `self.model = net`."""

    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()  # plain numbers; a step itself is neither copied nor pickled
        layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, width), *layers, nn.Linear(width, 10))
        batch = torch.randn(50, 1, 28, 28), torch.zeros(50, dtype=torch.int64)  # shapes and dtypes of the real ones
        self.step = bpfx.convert(net, F.cross_entropy, batch, blocks=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.step.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self.step(*batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.step.parameters(), lr=1e-3)  # the heads, too


if __name__ == "__main__":
    L.seed_everything(0)
    splits = bpfx.data.load()
    samples = list(zip(*next(bpfx.data.batches(splits.train, 4000)), strict=True))
    train = DataLoader(samples[:3000], batch_size=50, shuffle=True)
    test = DataLoader(samples[3000:], batch_size=500)

    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir="runs/lightning_module",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, train, test)  # fit(…, ckpt_path="….ckpt") continues
    print(f"accuracy {trainer.callback_metrics['accuracy']:.1%}")
    torch.save(module.step.model.state_dict(), "runs/lightning_module/model.pt")  # the plain model
