"""Which local loss a block gets: registered ones, one for every region, what they report, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx import losses
from bpfx.losses import Boundary, Given, Head, LocalLoss

# --- somebody's own loss ----------------------------------------------------------------------------------------------


class Spread(LocalLoss):
    """A third party's: keeps the features' variance at one."""

    name = "spread"
    label_free = True

    def head(self, boundary: Boundary) -> Head:
        return SpreadHead()


class SpreadHead(Head):
    description = "none (spread)"

    def forward(self, given: Given) -> Tensor:
        return (given.feature.flatten(1).var(0) - 1).square().mean()


@pytest.fixture
def registered() -> Any:
    losses.register(Spread)
    yield
    losses.registry._FACTORIES.pop("spread")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 12), nn.ReLU(),
        nn.Linear(12, 5),
    )  # fmt: skip


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 8, 8, generator=draw), torch.randint(5, (size,), generator=draw)


def convert(**options: Any) -> bpfx.Step:
    return bpfx.convert(net(), F.cross_entropy, batch(), **{"blocks": ["2", "5"], "offset": None, **options})


def test_a_third_party_registers_by_name(registered: None) -> None:
    assert "spread" in losses.names()
    assert [s.local_loss for s in convert(local_loss="spread").evaluate_blocks(*batch())] == ["spread"] * 2 + ["task"]
    with pytest.raises(bpfx.BpfxError, match="'spread' is registered already"):
        losses.register(lambda: Spread(), "spread")
    again = type("Spread", (losses.LocalLoss,), {"name": "spread", "__module__": Spread.__module__})
    assert losses.register(again) is again, "a notebook's cell that runs twice"


class Odd(losses.LocalLoss):
    """A loss of somebody who has not read the page."""

    name = "odd"

    def __init__(self, make: Any) -> None:
        self.make = make

    def head(self, boundary: Any) -> Any:
        return self.make(boundary)


class OddHead(Head):
    def __init__(self, compute: Any, **own: Any) -> None:
        super().__init__()
        self.compute, self.linear = compute, nn.Linear(6, 5)
        self.__dict__.update(own)

    def forward(self, given: Given) -> Any:
        return self.compute(self, given)


def pooled(head: OddHead, given: Given) -> Tensor:
    return head.linear(F.dropout(given.feature.flatten(2).mean(2), 0.5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda boundary: None, "'odd' built a NoneType; head\\(\\) must return a losses.Head"),
        (lambda boundary: nn.Linear(6, 5), "'odd' built a Linear"),
        (lambda boundary: OddHead(lambda head, given: given.feature), "block 0 gave a tensor of shape .*not a 0-dim"),
        (lambda boundary: OddHead(lambda head, given: 3.0), "block 0 gave float, not a 0-dim tensor"),
        (lambda boundary: OddHead(lambda head, given: given.judged(pooled(head, given))), "say uses_task = True"),
    ],
)
def test_a_third_partys_mistakes_are_named(make: Any, words: str) -> None:
    with pytest.raises(bpfx.BpfxError, match=words):
        convert(local_loss=Odd(make), blocks=["2"]).run_local(*batch())


def test_what_was_registered_has_to_be_a_loss() -> None:
    losses.register(lambda: 5, "five")  # type: ignore[arg-type,return-value]
    try:
        with pytest.raises(bpfx.BpfxError, match="'five' was registered with .* which made no LocalLoss: 5"):
            losses.get("five")
    finally:
        losses.registry._FACTORIES.pop("five")


def test_a_third_partys_head_is_put_in_place_and_its_dropout_kept_apart() -> None:
    """In double, although it made its weights in single; the blocks draw as without it."""

    class DropoutHead(OddHead):
        uses_task = True

        def __init__(self) -> None:
            super().__init__(lambda head, given: given.judged(head.linear(head.drop(given.feature))))
            self.drop = nn.Dropout(0.5)

    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 5)).double()
    x, y = torch.randn(6, 4).double(), batch()[1]
    odd = Odd(lambda boundary: DropoutHead())
    step = bpfx.convert(model, F.cross_entropy, (x, y), blocks=["2", "4"], offset=None, local_loss=odd)
    assert {p.dtype for p in step.heads.parameters()} == {torch.float64}
    found = []
    for call in (step.run_local, step.run_bp):
        torch.manual_seed(0)
        found.append(call(x, y).loss)
    assert torch.equal(*found)


def test_a_third_party_registers_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    monkeypatch.setitem(globals(), "Distant", type("Distant", (Spread,), {"name": "distant"}))
    point = EntryPoint("distant", f"{__name__}:Distant", losses.registry.GROUP)
    monkeypatch.setattr(losses.registry, "entry_points", lambda group: [point] if group == "bpfx.losses" else [])
    try:
        assert "distant" in losses.names()
        assert losses.get("distant").name == "distant"
    finally:
        losses.registry._FACTORIES.pop("distant", None)


# --- mixing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("supervised", ["supervised", "supervised"]),
        ({"0": "gim"}, ["supervised", "supervised"]),
        ({"1": "gim"}, ["gim", "supervised"]),
        ({0: "dgl", 1: "dgl"}, ["dgl", "dgl"]),
        ({0: "gim"}, ["gim", "supervised"]),
        ({1: "predsim", "*": "dgl"}, ["dgl", "predsim"]),
        ({"4": "predsim", "1": "dgl"}, ["dgl", "predsim"]),
    ],
    ids=str,
)
def test_a_loss_per_region(choice: Any, expected: list[str]) -> None:
    if choice == {"0": "gim"}:
        with pytest.raises(bpfx.BpfxError, match=r"key '0'.*0 \(0 … 1\)"):
            convert(local_loss=choice)
        return
    found = [s.local_loss for s in convert(local_loss=choice).evaluate_blocks(*batch())]
    assert found == [*expected, "task"]


def test_a_weight_scales_one_block() -> None:
    plain = convert().run_local(*batch())
    weighted = convert(local_loss={0: ("supervised", 0.25)}).run_local(*batch())
    of_first = {"0.weight", "0.bias", "bpfx.heads.0.linears.0.weight", "bpfx.heads.0.linears.0.bias"}
    assert of_first <= plain.grads.keys()
    for name, grad in plain.grads.items():
        torch.testing.assert_close(weighted.grads[name], grad * (0.25 if name in of_first else 1.0))
    torch.testing.assert_close(weighted.local_losses[0], plain.local_losses[0] * 0.25)


# --- diagnostics ------------------------------------------------------------------------------------------------------


def test_refreshes_and_windows_are_recorded() -> None:
    step = convert(offset=bpfx.Offset(period=10))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        step(*batch()).backward()
        optimizer.step()
    assert [set(w) for w in step.diagnostics.learning.windows] == [{0, 1, 2}] * 2
    assert all(gain > 0 for gain in step.diagnostics.learning.gains().values())
    assert all(set(b) >= {"block", "cosine", "ratio"} for b in step.diagnostics.refreshes[0]["blocks"])


@pytest.mark.parametrize("trainer", [False, True], ids=["drop-in", "block-serial"])
def test_a_block_that_does_not_learn_is_named(trainer: bool) -> None:
    step = convert()
    first = [*step.model[0].parameters(), *step.heads[0].parameters()]
    others = [p for p in step.parameters() if all(p is not q for q in first)]
    with pytest.warns(bpfx.BpfxWarning, match=r"block 0 \(.*\) does not learn"):
        if trainer:
            stuck = {id(p) for p in first}

            def factory(named: Any) -> torch.optim.Optimizer:
                named = list(named)
                return torch.optim.SGD(named, lr=0.0 if id(named[0][1]) in stuck else 0.1)

            serial = bpfx.BlockTrainer(step, factory)
            for _ in range(200):
                serial.step(*batch())
        else:
            optimizer = torch.optim.SGD(others, lr=0.1)
            for _ in range(200):
                optimizer.zero_grad()
                step(*batch()).backward()
                optimizer.step()


def test_the_plan_shows_what_heads_cost() -> None:
    plan = bpfx.plan(net(), F.cross_entropy, batch(), blocks=["2", "5"], offset=None)
    first = plan.blocks[0]  # mean over the positions, then linear, 6 features to 5 classes
    assert first.head_parameters == 6 * 5 + 5
    assert first.head_bytes == 4 * first.head_parameters
    assert first.head_flops == 3 * 2 * len(batch()[0]) * 6 * 5  # forward, gradient of the features, of the weights
    assert plan.blocks[-1].head_bytes == 0 and plan.blocks[-1].head_flops is None
    every = sum(b.head_parameters for b in plan.blocks)
    assert f"heads: {every:,} parameters" in str(plan)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_loss": "supervisd"}, r"'supervisd' is not known; the known ones are auglocal, dgl, .*supervised"),
        ({"local_loss": 3}, r"local_loss=3: pass a name"),
        ({"local_loss": ("supervised", 0)}, r"weight is 0, it must be positive"),
        ({"local_loss": ("supervised", 1, 2)}, r"pass a loss, or a pair"),
        ({"local_loss": {2.5: "supervised"}}, r"key 2.5; keys are module names"),
        ({"local_loss": {"layer9": "supervised"}}, r"'layer9', but no block .*0 \(0 … 1\)"),
        ({"local_loss": {0: "loco", 1: "supervised"}}, r"different horizons \(supervised 1, loco 2\)"),
        ({"local_loss": {0: "loco", 1: "loco"}}, "loco compares two views"),  # and not: other horizons than supervised
        ({"local_loss": "loco"}, r"loco compares two views .*LoCo\(augment=...\).*Views\(first, second\)"),
    ],
)  # fmt: skip
def test_bad_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(bpfx.BpfxError, match=message):
        convert(**options)


@pytest.mark.parametrize("name", ["supervised", "predsim", "forward_forward"])
def test_a_loss_that_needs_targets_says_so(name: str) -> None:
    wanted = f"local loss '{name}' needs a task loss"
    wanted = "needs a loss_fn and a batch \\(images, labels\\)" if name == "forward_forward" else wanted
    with pytest.raises(bpfx.BpfxError, match=wanted):
        bpfx.convert(net(), "local", batch()[0], blocks=2, local_loss=name)


def test_without_targets_the_loss_of_other_blocks_judges_the_output() -> None:
    with pytest.raises(bpfx.BpfxError, match="'supervised', of the model's output and of blocks without a key"):
        bpfx.convert(net(), "local", batch()[0], blocks=["2", "5"], local_loss={0: "gim", 1: "gim"})


def test_a_key_may_name_a_block_that_has_the_task_loss_at_this_horizon() -> None:
    """So that one mapping serves every horizon."""
    for horizon, expected in ((1, ["supervised", "dgl", "task"]), (2, ["supervised", "task", "task"])):
        step = convert(local_loss={1: "dgl"}, horizon=horizon)
        assert [s.local_loss for s in step.evaluate_blocks(*batch())] == expected


@pytest.mark.parametrize(("first", "second"), [((4, 3), (4, 2)), ((4, 3), (5, 3))])
def test_views_of_different_shapes_are_refused(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(bpfx.BpfxError, match="the two views differ"):
        losses.Views(torch.zeros(first), torch.zeros(second))
    with pytest.raises(bpfx.BpfxError, match="the second view is a list"):
        losses.Views(torch.zeros(first), [1.0])  # type: ignore[arg-type]


def test_views_for_a_loss_without_views_are_refused() -> None:
    x, y = batch()
    with pytest.raises(bpfx.BpfxError, match="takes no second view"):
        bpfx.convert(net(), F.cross_entropy, (losses.Views(x, x), y), blocks=2)
