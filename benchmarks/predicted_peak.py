"""Predicted against measured peak memory of training steps on the CPU.

    python benchmarks/predicted_peak.py                       # the whole table, 2 minutes on 2 quiet cores
    python benchmarks/predicted_peak.py --only resnet18       # cases whose name contains a word

Writes ``benchmarks/results/predicted_peak.json`` and ``.md``. Peaks are MiB above the state before the step: model,
batch and nothing else is live then, and gradients are kept until the end of the step.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bpfx.memory import measure_peak, mib
from bpfx.passes.liveness import predict_peak

RESULTS = Path(__file__).parent / "results"
State = dict[str, Tensor]
Step = Callable[[State, State, Tensor, Tensor], object]


def resnet_pieces(model: Any, inside: bool) -> list[nn.Module]:
    """A ResNet as a chain: stem, residual blocks, head; with ``inside`` the stem is cut too."""
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    pieces: list[nn.Module] = [nn.Sequential(*stem[:3]), stem[3]] if inside else [nn.Sequential(*stem)]
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        pieces.extend(layer)
    return [*pieces, nn.Sequential(model.avgpool, nn.Flatten(), model.fc)]


class Residual(nn.Module):
    """Part of a bottleneck on the pair (main branch, shortcut), so that it can be cut inside."""

    def __init__(self, block: Any, part: int) -> None:
        super().__init__()
        self.part = part
        self.conv, self.bn = (block.conv1, block.conv2, block.conv3)[part], (block.bn1, block.bn2, block.bn3)[part]
        self.downsample = block.downsample if part == 2 else None

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        main, shortcut = pair
        if self.part == 0:
            return F.relu(self.bn(self.conv(main))), main
        if self.part == 1:
            return F.relu(self.bn(self.conv(main))), shortcut
        out = self.bn(self.conv(main)) + (self.downsample(shortcut) if self.downsample else shortcut)
        return (out := F.relu(out)), out


def pairs(model: Any) -> list[nn.Module]:
    """A ResNet-50 cut after every convolution."""

    class First(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x := super().forward(x)), x

    class Last(nn.Sequential):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return super().forward(pair[0])

    blocks = [b for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for b in layer]
    parts = [Residual(block, part) for block in blocks for part in range(3)]
    first, last = First(model.conv1, model.bn1, model.relu, model.maxpool), Last(model.avgpool, nn.Flatten(), model.fc)
    return [first, *parts, last]


def vit_pieces(model: Any) -> list[nn.Module]:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.token, self.pos = model.conv_proj, model.class_token, model.encoder.pos_embedding

        def forward(self, x: Tensor) -> Tensor:
            x = self.proj(x).flatten(2).transpose(1, 2)
            return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.pos

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = model.encoder.ln, model.heads

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x)[:, 0])

    return [Stem(), *model.encoder.layers, Last()]


class Chain(nn.Module):
    """Pieces with, for local steps, one pool-and-linear head each."""

    def __init__(self, pieces: list[nn.Module], example: Tensor, classes: int) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.heads = nn.ModuleList()
        self.classes = classes
        with torch.no_grad():
            value: Any = example[:2]
            for piece in pieces[:-1]:
                value = piece(value)
                self.heads.append(nn.Linear(self.pool(value).shape[1], classes))

    @staticmethod
    def pool(value: Any) -> Tensor:
        value = value[0] if isinstance(value, tuple) else value
        return value.mean((2, 3)) if value.dim() == 4 else value.mean(1)


def call(module: nn.Module, prefix: str, params: State, buffers: State, *args: Any) -> Any:
    own = {k.removeprefix(prefix): v for k, v in {**params, **buffers}.items() if k.startswith(prefix)}
    return torch.func.functional_call(module, own, args)


def of(prefix: str, params: State) -> list[Tensor]:
    return [value for key, value in params.items() if key.startswith(prefix)]


def chain_loss(chain: Chain, params: State, buffers: State, x: Any, y: Tensor, recompute: bool, ends: bool) -> Tensor:
    for index, piece in enumerate(chain.pieces):
        prefix = f"pieces.{index}."
        if recompute and (ends or 0 < index < len(chain.pieces) - 1):
            x = checkpoint(call, piece, prefix, params, buffers, x, use_reentrant=False)
        else:
            x = call(piece, prefix, params, buffers, x)
    return F.cross_entropy(x, y)


def bp(chain: Chain, recompute: bool = False, ends: bool = True) -> Step:
    """Back-propagation, optionally with every piece checkpointed, or every piece but the first and the last."""

    def step(params: State, buffers: State, x: Tensor, y: Tensor) -> object:
        loss = chain_loss(chain, params, buffers, x, y, recompute, ends)
        return torch.autograd.grad(loss, of("pieces.", params))

    return step


def local(chain: Chain) -> Step:
    """Forward, head, loss and gradient of each piece before the next one runs."""

    def step(params: State, buffers: State, x: Tensor, y: Tensor) -> object:
        gradients: list[Tensor] = []
        value: Any = x
        for index, piece in enumerate(chain.pieces):
            value = call(piece, f"pieces.{index}.", params, buffers, value)
            wanted = of(f"pieces.{index}.", params)
            if index == len(chain.pieces) - 1:
                loss = F.cross_entropy(value, y)
            else:
                head = f"bpfx.heads.{index}."
                logits = call(chain.heads[index], head, params, buffers, chain.pool(value))
                loss, wanted = F.cross_entropy(logits, y), wanted + of(head, params)
            if index and isinstance(value, tuple) or wanted:
                gradients.extend(torch.autograd.grad(loss, wanted))
            del loss
            value = tuple(v.detach() for v in value) if isinstance(value, tuple) else value.detach()
        return gradients

    return step


def serial_vjp(chain: Chain) -> Step:
    """Exact gradients: boundaries are stored, then every piece is recomputed and pulled back, last to first."""

    def step(params: State, buffers: State, x: Tensor, y: Tensor) -> object:
        inputs: list[Tensor] = [x]
        with torch.no_grad():
            for index, piece in enumerate(chain.pieces[:-1]):
                inputs.append(call(piece, f"pieces.{index}.", params, buffers, inputs[-1]))
        gradients: list[Tensor] = []
        cotangent: Tensor | None = None
        for index in reversed(range(len(chain.pieces))):
            value = inputs.pop().requires_grad_(index > 0)
            out = call(chain.pieces[index], f"pieces.{index}.", params, buffers, value)
            out = F.cross_entropy(out, y) if cotangent is None else out
            wanted = of(f"pieces.{index}.", params) + ([value] if index else [])
            grads = list(torch.autograd.grad(out, wanted, cotangent))
            cotangent = grads.pop() if index else None
            gradients.extend(grads)
            del out, value, grads
        return gradients

    return step


def llama(exported: bool) -> tuple[nn.Module, Step, Tensor, Tensor]:
    """transformers takes another attention path when it sees fake tensors; an exported graph has only one path."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    tokens = torch.randint(0, 2000, (4, 512))
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if exported:
        model = torch.export.export(model, (), inputs, strict=False).module()

    def step(params: State, buffers: State, x: Tensor, y: Tensor) -> object:
        batch = {"input_ids": x, "labels": y, "use_cache": False}
        out = torch.func.functional_call(model, {**params, **buffers}, (), batch)
        return torch.autograd.grad(out.loss, list(params.values()))

    return model, step, tokens, tokens


Case = tuple[str, Callable[[], tuple[nn.Module, Step, Tensor, Tensor]]]


def cases() -> Iterator[Case]:
    import torchvision.models as zoo

    def whole(name: str, size: int, last: bool = False) -> Any:
        def build() -> tuple[nn.Module, Step, Tensor, Tensor]:
            x, y = torch.randn(size, 3, 224, 224), torch.randint(0, 1000, (size,))
            model = getattr(zoo, name)(weights=None)
            if last:
                model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
            chain = Chain([model], x, 1000)
            return chain, bp(chain), x, y

        return build

    def chained(name: str, size: int, pieces: Callable[[Any], list[nn.Module]], step: Callable[[Chain], Step]) -> Any:
        def build() -> tuple[nn.Module, Step, Tensor, Tensor]:
            x, y = torch.randn(size, 3, 224, 224), torch.randint(0, 1000, (size,))
            chain = Chain(pieces(getattr(zoo, name)(weights=None)), x, 1000)
            return chain, step(chain), x, y

        return build

    def recompute(chain: Chain) -> Step:
        return bp(chain, recompute=True)

    def recompute_blocks(chain: Chain) -> Step:
        return bp(chain, recompute=True, ends=False)

    def plain(model: Any) -> list[nn.Module]:
        return resnet_pieces(model, inside=False)

    def fine(model: Any) -> list[nn.Module]:
        return resnet_pieces(model, inside=True)

    for name, size, split in (("resnet18", 32, plain), ("resnet50", 32, plain), ("vit_b_16", 8, vit_pieces)):
        kinds: tuple[tuple[str, Callable[[Chain], Step]], ...]
        kinds = (("BP", bp), ("checkpointing", recompute), ("local", local), ("block-serial BP", serial_vjp))
        for kind, step in kinds:
            yield f"{name} {size} {kind}", chained(name, size, split, step)
    yield "resnet50 32 checkpointing, stem kept", chained("resnet50", 32, plain, recompute_blocks)
    yield "resnet50 32 local, stem cut", chained("resnet50", 32, fine, local)
    yield "resnet50 32 local, every convolution", chained("resnet50", 32, pairs, local)
    for name, size in (("mobilenet_v3_small", 16), ("convnext_tiny", 4), ("densenet121", 8), ("swin_t", 4)):
        yield f"{name} {size} BP", whole(name, size)
    yield "resnet18 8 BP channels_last", whole("resnet18", 8, last=True)
    yield "Llama 4x512 BP", lambda: llama(exported=False)
    yield "Llama 4x512 BP, exported", lambda: llama(exported=True)


def run(case: Case) -> dict[str, Any]:
    name, build = case
    torch.manual_seed(0)
    model, step, x, y = build()
    state: Sequence[Any] = (dict(model.named_parameters()), dict(model.named_buffers()), x, y)
    predict_peak(lambda value: value + 1, x)  # imports
    start = time.perf_counter()
    predicted = predict_peak(step, *state)
    seconds = time.perf_counter() - start
    without = predict_peak(step, *state, workspace=False).peak_bytes
    measured = measure_peak(lambda: step(*state), warmup=0).peak_bytes
    return {
        "case": name,
        "measured_mib": round(mib(measured), 1),
        "predicted_mib": round(mib(predicted.peak_bytes), 1),
        "error_percent": round(100 * (predicted.peak_bytes / measured - 1), 1),
        "without_workspace_mib": round(mib(without), 1),
        "predict_seconds": round(seconds, 2),
    }


def markdown(rows: list[dict[str, Any]], where: str) -> str:
    lines = [
        "| step | measured MiB | predicted MiB | error | without workspace model | seconds to predict |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        numbers = f"{r['measured_mib']:.0f} | {r['predicted_mib']:.0f} | {r['error_percent']:+.1f} %"
        lines.append(f"| {r['case']} | {numbers} | {r['without_workspace_mib']:.0f} | {r['predict_seconds']:.1f} |")
    return "\n".join([where, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write nothing")
    only = parser.parse_args().only
    rows = []
    for case in cases():
        if only in case[0]:
            rows.append(run(case))
            print(json.dumps(rows[-1]), flush=True)
    isa = torch.backends.cpu.get_cpu_capability()
    where = f"torch {torch.__version__}, {platform.machine()} {isa}, {torch.get_num_threads()} threads, fp32."
    if only:
        print(markdown(rows, where))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "predicted_peak.json").write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")
    (RESULTS / "predicted_peak.md").write_text(markdown(rows, where))
    print(markdown(rows, where))


if __name__ == "__main__":
    main()
