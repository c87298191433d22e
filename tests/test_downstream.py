"""Heads of the model's own later parts, and the two losses that came with them.

A head of all later parts, copied just now, is the rest of the model: its loss is the task loss, and the gradient of its
block the BP gradient. That is the oracle for cutting, copying and chaining.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import assert_gradients, assert_same_bits, bp_oracle, buffers
from torch import Tensor, nn
from zoo import Case

import bpfx
from bpfx.errors import BpfxError
from bpfx.losses import Boundary, Given
from bpfx.losses.auglocal import AugLocal
from bpfx.losses.feature_reconstruction import FeatureReconstruction
from bpfx.passes.downstream import uniform

ALL = AugLocal("downstream:99", pyramid=None)


def convert(case: Case, blocks: Any, loss: Any = ALL, **options: Any) -> Any:
    options.setdefault("offset", None)
    return bpfx.convert(
        case.model, case.loss_fn, case.batch, blocks=blocks, compile="eager", local_loss=loss, **options
    )


def run(step: Any, batch: Any) -> Any:
    return step.run_local(**batch) if isinstance(batch, dict) else step.run_local(*batch)


def still(case: Case) -> Case:
    """Dropout and stochastic depth off, in train mode: heads leave dropout out, and draw depths of their own."""
    for module in case.model.modules():
        for name in ("p", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        for name in ("attn_dropout", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    config = getattr(case.model, "config", None)
    for name in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return case


class Vgg(nn.Sequential):
    """Plain layers in a row, with pooling and in-place activations."""

    def __init__(self) -> None:
        def layer(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

        super().__init__(
            *layer(3, 6), *layer(6, 6), nn.MaxPool2d(2), *layer(6, 8), *layer(8, 8), *layer(8, 8), *layer(8, 8),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip


def vgg(size: int = 4) -> Case:
    torch.manual_seed(0)
    return zoo.outside(Vgg().double().train(), torch.randn(size, 3, 16, 16).double(), torch.arange(size) % 5)


def case_of(name: str) -> tuple[Case, list[str]]:
    if name == "vgg":
        return vgg(), ["3", "10"]
    return still(zoo.ZOO[name].case()), list(zoo.ZOO[name].cuts)


# --- all parts are the rest of the model -----------------------------------------------------------------------------


PARTS = {
    "vgg": ["3", "7", "10", "13", "16", "readout"],
    "resnet18": ["layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1", "readout"],
    # Attention and MLP of a layer are one part: chosen one by one, all attention could be left out.
    "timm_vit": ["blocks.1", "blocks.2", "blocks.3", "readout"],
    "gpt2": ["transformer.h.1", "transformer.h.2", "readout"],
    "bert": ["bert.encoder.layer.1", "bert.encoder.layer.2", "bert.pooler.dense", "readout"],
    "in_place": ["blocks.1.conv", "blocks.2.conv", "readout"],
    "tuple_output": ["blocks.1.body", "blocks.2.body", "readout"],
}


@pytest.mark.parametrize("name", PARTS)
def test_all_parts_are_the_rest_of_the_model(name: str) -> None:
    case, cuts = case_of(name)
    expected = bp_oracle(case)
    step = convert(case, cuts)
    assert step.plan.blocks[0].head == f"{len(PARTS[name])} copied parts: {', '.join(PARTS[name])}"
    result = run(step, case.batch)
    assert len(result.local_losses) == len(cuts) + 1
    for local in result.local_losses:
        torch.testing.assert_close(local, expected.loss, rtol=1e-9, atol=1e-12)
    own = {n: g for n, g in result.grads.items() if not n.startswith("bpfx.heads.")}
    if name == "gpt2":  # the embedding is the readout's weight too, and a copy of it has a gradient of its own
        tied = case.model.transformer.wte.weight
        copies = [p for n, p in step.heads.named_parameters() if p.shape == tied.shape]
        assert len(copies) == 2
        assert all(torch.equal(p, tied) and p.data_ptr() != tied.data_ptr() for p in copies)
        own.pop("transformer.wte.weight"), expected.grads.pop("transformer.wte.weight")
    assert_gradients(own, expected.grads)

    other = vgg(6) if name == "vgg" else still(zoo.ZOO[name].case(zoo.ZOO[name].size + 1))
    result = run(step, other.batch)
    for local in result.local_losses:
        torch.testing.assert_close(local, result.loss, rtol=1e-9, atol=1e-12)


# --- which parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", range(1, 40))
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 9])
def test_layers_are_chosen_by_the_papers_rule(layers: int, depth: int) -> None:
    """Of layers l+1 … N-1, index round(l + (N-1-l) i / d) for i = 1 … d; all of them where there are not more."""
    chosen = uniform(layers, depth)
    position, last = 0, layers  # the layers behind layer 0
    if depth >= last - position:
        assert chosen == list(range(layers))
        return
    rule = [round(position + (last - position) * i / depth) for i in range(1, depth + 1)]
    assert [i + 1 for i in chosen] == rule
    assert len(set(chosen)) == depth
    assert chosen[-1] == layers - 1


@pytest.mark.parametrize(("pyramid", "deepest"), [(0.5, 2), (0.5, 9), (1.0, 6), (0.0, 4)])
def test_pyramid(pyramid: float, deepest: int) -> None:
    """Linear from d to (1 - tau) d + tau over the blocks that have a head, never below 1."""
    loss, count = AugLocal(f"downstream:{deepest}", pyramid=pyramid), 12
    shares = torch.linspace(0, pyramid, count - 1, dtype=torch.float64).tolist()
    wanted = [max(1, round((1 - s) * deepest + s)) for s in shares]
    assert [loss.depth(k, count) for k in range(count - 1)] == wanted
    assert [AugLocal("downstream:3", pyramid=None).depth(k, count) for k in range(4)] == [3] * 4
    assert loss.depth(0, 2) == deepest


@pytest.mark.parametrize(
    ("name", "depth", "wanted"),
    [
        ("vgg", 1, ["7", "16", "readout"]),
        ("vgg", 2, ["7", "16", "readout"]),
        ("vgg", 3, ["7", "10", "16", "readout"]),
        ("timm_vit", 1, ["blocks.3", "readout"]),
        ("timm_vit", 2, ["blocks.2", "blocks.3", "readout"]),
    ],
)
def test_parts_of_the_first_head_chain(name: str, depth: int, wanted: list[str]) -> None:
    case, cuts = case_of(name)
    step = convert(case, cuts, AugLocal(f"downstream:{depth}", pyramid=None))
    plan = step.plan.blocks[0]
    assert plan.head == f"{len(wanted)} copied parts: {', '.join(wanted)}"
    assert plan.head_parameters == sum(p.numel() for p in step.heads[0].parameters()) > 0
    result = run(step, case.batch)
    assert all(torch.isfinite(local) for local in result.local_losses)
    assert set(result.grads) >= {f"bpfx.heads.{n}" for n, _ in step.heads.named_parameters()}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_head_of_some_parts_is_those_parts_and_the_readout(depth: int) -> None:
    """Against the layers called by hand, picked by the paper's rule."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)), nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 6).double(), torch.arange(8) % 3
    step = convert(zoo.outside(net, x, y), ["1", "2"], AugLocal(f"downstream:{depth}", pyramid=None))
    result = step.run_local(x, y)
    z = net[0](x)
    for i in range(1, depth + 1):
        z = net[round(5 * i / depth)](z)
    local = F.cross_entropy(net[6](z), y)
    torch.testing.assert_close(result.local_losses[0], local.detach())
    named = dict(net[0].named_parameters())
    expected = dict(zip(named, torch.autograd.grad(local, list(named.values())), strict=True))
    assert_gradients({n: result.grads[f"0.{n}"] for n in named}, expected)


def test_stochastic_depth_stays_and_is_the_heads_own() -> None:
    case = zoo.ZOO["timm_vit"].case()
    step = convert(case, list(zoo.ZOO["timm_vit"].cuts))
    assert step.heads[0].random
    torch.manual_seed(3)
    run(step, case.batch)
    after = torch.get_rng_state()
    plain = convert(zoo.ZOO["timm_vit"].case(), list(zoo.ZOO["timm_vit"].cuts), "supervised")
    torch.manual_seed(3)
    run(plain, case.batch)
    assert torch.equal(after, torch.get_rng_state()), "a head's draws must not shift the blocks'"


# --- isolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg", "in_place"])
def test_originals_are_not_touched(name: str) -> None:
    case, cuts = case_of(name)
    step = convert(case, cuts, AugLocal("downstream:2"))
    assert bpfx.audit(step).ok
    assert not bpfx.audit(step, cut=False).ok
    own = {id(p) for p in case.model.parameters()} | {id(b) for b in case.model.buffers()}
    assert not any(id(t) in own for t in (*step.heads.parameters(), *step.heads.buffers()))

    # A step of the first block and its head alone moves nothing else.
    result = run(step, case.batch)
    first = set(step.plan.blocks[0].parameter_names)
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    parameters = {
        **dict(case.model.named_parameters()),
        **{f"bpfx.heads.{n}": p for n, p in step.heads.named_parameters()},
    }
    moved = [n for n in result.grads if n in first or n.startswith("bpfx.heads.0.")]
    with torch.no_grad():
        for n in moved:
            parameters[n] -= 0.1 * result.grads[n]
    changed = {n for n, p in case.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= first


def test_running_statistics_are_updated_once() -> None:
    case, cuts = case_of("vgg")
    expected = bp_oracle(case)
    step = convert(case, cuts, AugLocal("downstream:2"))
    heads = {n: b.clone() for n, b in step.heads.named_buffers()}
    run(step, case.batch)
    assert_same_bits(buffers(case.model), expected.buffers)
    means = [n for n in heads if n.endswith("running_mean")]
    assert means
    for n, b in step.heads.named_buffers():
        assert n not in means or not torch.equal(b, heads[n]), "a copy keeps statistics of its own"


def test_an_in_place_activation_behind_the_boundary_does_not_change_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(F.relu_(self.two(F.relu_(self.one(x)))))

    net = Net().double()
    x, y = torch.randn(8, 6).double(), torch.arange(8) % 3
    case = zoo.outside(net, x, y)

    def behind_the_layers(points: list[Any]) -> list[Any]:
        return [p for p in points if p.after.startswith("linear")]

    expected = bp_oracle(case)
    result = run(convert(case, behind_the_layers), case.batch)
    assert len(result.local_losses) == 3
    for local in result.local_losses:  # the task loss is last: a changed boundary would change it
        torch.testing.assert_close(local, expected.loss, rtol=1e-12, atol=0)
    assert_gradients({n: g for n, g in result.grads.items() if not n.startswith("bpfx.")}, expected.grads)


def test_memory_written_through_a_view_is_written_in_the_copy_too() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y[:, 0].fill_(1.0)  # nobody reads what fill_ returns
            return y.tanh()

    case = zoo.outside(
        nn.Sequential(*(Masked() for _ in range(3)), nn.Linear(6, 3)).double(),
        torch.randn(8, 6).double(),
        torch.arange(8) % 3,
    )
    expected = bp_oracle(case)
    result = run(convert(case, ["1", "2"]), case.batch)
    for local in result.local_losses:
        torch.testing.assert_close(local, expected.loss, rtol=1e-12, atol=0)


# --- what is frozen, what is large -----------------------------------------------------------------------------------


def test_frozen_weights_are_borrowed() -> None:
    case = still(zoo.ZOO["llama_lora"].case())
    step = convert(case, list(zoo.ZOO["llama_lora"].cuts))
    frozen = {n for n, p in case.model.named_parameters() if not p.requires_grad}
    head = step.heads[0]
    assert set(head.borrows) <= frozen
    assert head.borrows
    assert all("lora" in n for n, _ in head.named_parameters())
    expected = bp_oracle(case)
    result = run(step, case.batch)
    for local in result.local_losses:
        torch.testing.assert_close(local, expected.loss, rtol=1e-9, atol=1e-12)
    assert_gradients({n: g for n, g in result.grads.items() if not n.startswith("bpfx.")}, expected.grads)
    assert not any(n.startswith("bpfx.heads") and "lora" not in n for n in result.grads)


def test_a_large_readout_is_borrowed() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 40_000))
    case = zoo.outside(net, torch.randn(4, 8), torch.arange(4))
    step = convert(case, ["2"])
    assert step.heads[0].borrows == ("4.weight",)
    assert step.plan.blocks[0].head == "2 copied parts: 2, readout; 1 weights borrowed"
    result = run(step, case.batch)
    torch.testing.assert_close(result.local_losses[0], result.loss)


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["downstream", "downstream:0", "downstream:-1", "downstream:x", "mlp:2", "", 2])
def test_the_head_is_a_word_and_a_depth(head: Any) -> None:
    with pytest.raises(BpfxError, match=r"pass 'downstream:d' with a depth d of at least 1"):
        AugLocal(head)


@pytest.mark.parametrize("pyramid", [-0.1, 1.5, "0.5", True])
def test_pyramid_is_a_share(pyramid: Any) -> None:
    with pytest.raises(BpfxError, match="from 0 to 1, or None"):
        AugLocal(pyramid=pyramid)


def test_skips_over_a_boundary_are_refused() -> None:
    entry = zoo.ZOO["unet"]
    with pytest.raises(BpfxError, match=r"dropout .* cross there; use another .*local_loss=.* 0: 'supervised'"):
        convert(entry.case(), ["middle", "up1"])


def test_an_opaque_part_is_refused_only_where_it_is_chosen() -> None:
    entry = zoo.ZOO["branch_inside"]
    with pytest.raises(BpfxError, match=r"blocks\.1 runs as one opaque module and cannot be copied; use another"):
        convert(entry.case(), list(entry.cuts))
    step = convert(entry.case(), ["blocks.1"], AugLocal("downstream:1"))
    assert step.plan.blocks[0].head == "2 copied parts: blocks.2.body, readout"
    assert torch.isfinite(run(step, entry.case(5).batch).local_losses[0])  # another batch size, captured anew


def test_alone_there_is_nothing_to_copy() -> None:
    with pytest.raises(BpfxError, match=r"through bpfx\.convert with a task loss"):
        AugLocal().head(Boundary.of(torch.zeros(2, 3), classes=2))


# --- feature reconstruction ------------------------------------------------------------------------------------------


def transcription(decoder: nn.Linear, leaving: Tensor, entering: Tensor) -> Tensor:
    """Both with features last."""
    found = leaving @ decoder.weight.T + decoder.bias
    return ((found - entering) ** 2).mean() / entering.var(unbiased=False)


@pytest.mark.parametrize(
    ("leaving", "entering", "pooled"),
    [
        ((4, 7, 6), (4, 7, 6), None),
        ((4, 7, 6), (4, 7, 5), None),
        ((4, 6, 5, 5), (4, 3, 5, 5), None),
        ((4, 6, 3, 3), (4, 3, 6, 6), "pool"),
        ((4, 6, 1, 1), (4, 6, 5, 4), "pool"),
        ((4, 5, 6), (4, 10, 6), "pool"),
        ((4, 9, 6), (4, 3, 8, 8), "mean"),
        ((4, 6), (4, 3, 8, 8), "mean"),
        ((4, 6), (4, 6), None),
    ],
)
def test_reconstruction_is_the_formula(leaving: tuple, entering: tuple, pooled: str | None) -> None:
    h, x = torch.randn(leaving).double().requires_grad_(), (3 * torch.randn(entering).double() + 1)
    head = FeatureReconstruction().head(Boundary.of(h, entering=x))
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    loss = head(Given.of(h, entering=x))
    last = lambda t: t.movedim(1, -1) if t.dim() >= 4 else t  # noqa: E731
    a, b = last(h), last(x)
    if pooled == "mean":
        a, b = a.flatten(1, -2).mean(1) if a.dim() > 2 else a, b.flatten(1, -2).mean(1)
    elif pooled == "pool" and a.dim() == 3:
        b = b.reshape(4, 5, 2, -1).mean(2)
    elif pooled == "pool":
        b = F.adaptive_avg_pool2d(x, leaving[2:]).movedim(1, -1)
    expected = transcription(head.decoder, a, b)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    tensors = [h, *head.parameters()]
    for got, wanted in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (4, 7, 6), (4, 6, 5, 5), (1, 6, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_identity_block_has_no_loss(shape: tuple, dtype: torch.dtype) -> None:
    x = 1000 * torch.randn(shape).to(dtype)
    head = FeatureReconstruction().head(Boundary.of(x, entering=x))
    assert head(Given.of(x, entering=x)).item() == 0
    other = torch.randn(6, *shape[1:]).to(dtype)  # another batch size
    assert torch.isfinite(head(Given.of(other, entering=2 * other)))
    assert torch.isfinite(head(Given.of(other, entering=torch.zeros_like(other))))


def test_the_scale_of_the_stream_does_not_matter() -> None:
    h, x = torch.randn(4, 7, 6).double(), torch.randn(4, 7, 6).double()
    head = FeatureReconstruction().head(Boundary.of(h, entering=x))
    torch.testing.assert_close(head(Given.of(h, entering=x)), head(Given.of(100 * h, entering=100 * x)))


def test_fine_tuning_a_language_model() -> None:
    case, cuts = case_of("gpt2")
    step = convert(case, cuts, {"*": FeatureReconstruction(), 0: "supervised"})
    assert step.plan.blocks[1].head == "tokens 32 → 32 linear decoder from the identity"
    assert bpfx.audit(step).ok
    # Block 1 by hand: what enters it, what leaves it.
    seen: dict[str, Tensor] = {}
    blocks = case.model.transformer.h
    handles = [
        blocks[1].register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach())),
        blocks[2].register_forward_pre_hook(lambda m, args: seen.update(h=args[0].detach())),
    ]
    case.model(**case.batch)
    for handle in handles:
        handle.remove()
    result = run(step, case.batch)
    expected = transcription(step.heads[1].decoder, seen["h"], seen["x"])
    torch.testing.assert_close(result.local_losses[1], expected, rtol=1e-9, atol=1e-12)

    optimizer = torch.optim.SGD([*step.model.parameters(), *step.heads.parameters()], lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        step(**case.batch).loss.backward()
        optimizer.step()
    assert run(step, case.batch).local_losses[1] < expected


def test_reconstruction_of_an_image_and_over_a_horizon() -> None:
    case = vgg()
    step = convert(case, ["3", "10"], {"*": FeatureReconstruction()})
    assert step.plan.blocks[0].head == "image 6 → 3 linear decoder"
    assert step.plan.blocks[1].head == "image 8 → 6 linear decoder, target pooled to the positions"
    run(step, case.batch)
    ahead = convert(vgg(), ["3", "10"], {"*": FeatureReconstruction()}, horizon=2)
    result = run(ahead, case.batch)
    assert all(torch.isfinite(local) for local in result.local_losses)
    assert "8 → 3" in ahead.plan.blocks[1].head


@pytest.mark.parametrize(
    ("boundary", "words"),
    [
        (Boundary.of(torch.zeros(2, 3)), r"nothing of floating point enters block 0 .* 0: 'tied_readout'"),
        (Boundary.of(torch.zeros(2, 3), entering=torch.zeros(2, 3).long(), index=1), "enters block 1"),
        (Boundary.of(torch.zeros(2, 3), entering=torch.zeros(2)), "needs samples with features"),
        (Boundary.of(torch.zeros(2, 3), entering=torch.zeros(8, 3)), "not as many"),
    ],
)
def test_reconstruction_refuses(boundary: Boundary, words: str) -> None:
    with pytest.raises(BpfxError, match=words):
        FeatureReconstruction().head(boundary)
