"""Of the experts of a layer only routed ones are read; whatever else is done with their weights is right."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import odewei
from odewei import errors, hf
from odewei.experts import find_experts, listed_experts
from odewei.loaders import SafetensorsLoader
from odewei.placeholder import Placeholder
from odewei.runtime import runtime_of
from odewei.sliced import SlicedWeight
from odewei.survey import survey
from odewei.torch import init_on_demand_weights_model
from odewei.units import partition
from tests import models

EXPERTS, ROUTED, LAYERS = 64, 2, 3
ONE_BY_ONE = ["eager", "odewei"]
TIGHT = "700kB"  # a fused weight has 3 MiB, an expert 72 KiB, all else 220 KiB


def mixtral(implementation: str = "eager") -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    hf.register_experts()
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=ROUTED,
            vocab_size=99,
            experts_implementation=implementation,
        )
    )


def qwen(implementation: str = "eager") -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    hf.register_experts()
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=EXPERTS,
            num_experts_per_tok=ROUTED,
            vocab_size=99,
            experts_implementation=implementation,
        )
    )


def gpt_oss(implementation: str = "eager") -> nn.Module:
    """Transposed, with biases, and a gate of its own."""
    from transformers import GptOssConfig, GptOssForCausalLM

    hf.register_experts()
    return GptOssForCausalLM(
        GptOssConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=EXPERTS,
            num_experts_per_tok=ROUTED,
            vocab_size=99,
            pad_token_id=0,
            experts_implementation=implementation,
        )
    )


KINDS: dict[str, Callable[[str], nn.Module]] = {"mixtral": mixtral, "qwen3": qwen, "gpt_oss": gpt_oss}


class Expert(nn.Module):
    """One of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Routing(nn.Module):
    """Experts that are modules, as transformers 4 had them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(ROUTED, -1)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            out.index_add_(0, token, self.experts[expert](x[token]) * weights[token, place, None])
        return out


class Fused(nn.Module):
    """A user's own module, which takes experts one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 96, 64) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, 64, 96) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(ROUTED, -1)
        rows = []
        for token, row in enumerate(x):
            parts = [
                F.linear(F.linear(row, self.up[expert]).relu(), self.down[expert]) * weights[token, place]
                for place, expert in enumerate(chosen[token].tolist())
            ]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)


class Stack(nn.Module):
    """Layers of which each has experts."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 64)
        self.layers = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(64, 64), "moe": kind()}) for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids[0])
        for layer in self.layers:
            x = x + layer["moe"](layer["mix"](x))
        return x


def tokens(seed: int, length: int = 1) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))}


def expert_bytes(model: nn.Module) -> int:
    names = ("experts.", "moe.up", "moe.down")
    return sum(one.nbytes for name, one in model.named_parameters() if any(part in name for part in names))


def experts_of(model: nn.Module) -> nn.Module:
    return model.model.layers[1].mlp.experts


Saved = tuple[nn.Module, Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    model = models.resident(mixtral)
    return model, models.save(model, tmp_path_factory.mktemp("experts") / "model.safetensors")


@pytest.fixture(params=[(0, "eager"), ("auto", "eager"), ("auto", "odewei")], ids=["plain", "prefetch", "together"])
def pair(request: pytest.FixtureRequest, saved: Saved) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The resident and the streamed twin, under a budget that no fused weight fits into."""
    depth, implementation = request.param
    with models.streamed(
        lambda: mixtral(implementation), saved[1], memory_budget=TIGHT, prefetch_depth=depth
    ) as streamed:
        yield copy.deepcopy(saved[0]), streamed


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, "auto", 2])
@pytest.mark.parametrize("implementation", ONE_BY_ONE)
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_reads_two_of_sixty_four(kind: str, implementation: str, depth: int | str, tmp_path: Path) -> None:
    """At one token 2/64 of the bytes of experts are read and all else once, with the bits of the resident model."""
    model = models.resident(lambda: KINDS[kind]("eager"))
    path = models.save(model, tmp_path / "model.safetensors")
    rest = models.weight_bytes(model) - expert_bytes(model)
    options = {"memory_budget": "1GiB", "prefetch_depth": depth, "io": "buffered"}
    with models.streamed(lambda: KINDS[kind](implementation), path, **options) as streamed:
        assert models.same_bits(models.outputs(streamed, tokens(1)), models.outputs(model, tokens(1)))
        assert odewei.report(streamed).bytes_read == rest + expert_bytes(model) * ROUTED // EXPERTS
        assert models.same_bits(models.outputs(streamed, tokens(1)), models.outputs(model, tokens(1)))
        assert odewei.report(streamed).bytes_read == rest + expert_bytes(model) * ROUTED // EXPERTS
        assert models.same_bits(models.outputs(streamed, tokens(2, 9)), models.outputs(model, tokens(2, 9)))
        assert odewei.report(streamed).mispredictions == 0, "routing is not predicted, so it cannot be wrong"


@pytest.mark.parametrize("kind", [Routing, Fused])
@pytest.mark.parametrize("depth", [0, "auto", 2])
def test_experts_without_transformers(kind: type[nn.Module], depth: int | str, tmp_path: Path) -> None:
    """Experts in an nn.ModuleList, and in fused weights of a user's own module: only routed ones are read."""
    model = models.resident(lambda: Stack(kind))
    path = models.save(model, tmp_path / "model.safetensors")
    rest = models.weight_bytes(model) - expert_bytes(model)
    assert rest < expert_bytes(model) / 20
    for budget in ("1GiB", "500kB"):
        options = {"memory_budget": budget, "prefetch_depth": depth, "io": "buffered"}
        with models.streamed(lambda: Stack(kind), path, **options) as streamed:
            assert models.same_bits(models.outputs(streamed, tokens(1)), models.outputs(model, tokens(1)))
            assert odewei.report(streamed).bytes_read == rest + expert_bytes(model) * ROUTED // EXPERTS
            for seed in range(5):
                inputs = tokens(seed, 3)
                assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
            report = odewei.report(streamed)
            assert report.peak_bytes <= report.budget_bytes
            assert report.overdrafts == 0


def test_a_budget_that_no_fused_weight_fits_into(pair: tuple[nn.Module, nn.Module]) -> None:
    """Token after token: right, within the budget, and never more than the routed experts and the rest are read."""
    model, streamed = pair
    rest = models.weight_bytes(model) - expert_bytes(model)
    for count in range(1, 7):
        assert models.same_bits(models.outputs(streamed, tokens(count)), models.outputs(model, tokens(count)))
        report = odewei.report(streamed)
        assert report.bytes_read <= count * (rest + expert_bytes(model) * ROUTED // EXPERTS)
        assert report.peak_bytes <= report.budget_bytes < experts_of(model).gate_up_proj.nbytes
        assert report.overdrafts == 0


def test_many_tokens_under_a_tight_budget(pair: tuple[nn.Module, nn.Module]) -> None:
    """With most experts routed to, each is read about once a pass, and the budget holds."""
    model, streamed = pair
    for count in range(1, 4):
        inputs = tokens(count, 64)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
        report = odewei.report(streamed)
        assert report.bytes_read <= count * models.weight_bytes(model)
        assert report.peak_bytes <= report.budget_bytes
        assert report.overdrafts == 0


@pytest.mark.parametrize("implementation", ONE_BY_ONE)
def test_the_smallest_budget(implementation: str, saved: Saved) -> None:
    """What must be in memory at once is one expert, and what else runs while it does; that is enough."""
    model, path = saved
    smallest = models.smallest_budget(lambda: mixtral(implementation), path)
    one = expert_bytes(model) // EXPERTS // LAYERS
    assert one <= smallest < 2 * one
    with models.streamed(lambda: mixtral(implementation), path, memory_budget=smallest) as streamed:
        for seed in range(3):
            inputs = tokens(seed, 5)
            assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
        assert odewei.report(streamed).overdrafts == 0


def test_direct_reads(saved: Saved) -> None:
    """Past the page cache the same is read, but for the pages that begin and end elsewhere."""
    model, path = saved
    rest = models.weight_bytes(model) - expert_bytes(model)
    with models.streamed(mixtral, path, memory_budget="1GiB", io="direct") as streamed:
        assert models.same_bits(models.outputs(streamed, tokens(1)), models.outputs(model, tokens(1)))
        assert odewei.report(streamed).bytes_read < 1.2 * (rest + expert_bytes(model) * ROUTED / EXPERTS)


# -- implementations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_implementations_that_take_all(implementation: str, saved: Saved) -> None:
    """Their weights are read ahead as any other, and the bits are those of the resident model in the same way."""
    path = saved[1]
    model = models.resident(lambda: mixtral(implementation))
    with models.streamed(lambda: mixtral(implementation), path, memory_budget="8MiB") as streamed:
        assert not runtime_of(streamed).experts
        for seed in range(3):
            inputs = tokens(seed, 4)
            assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
        assert odewei.report(streamed).overdrafts == 0


@pytest.mark.parametrize("first", ["eager", "grouped_mm"])
def test_another_implementation_later(first: str, saved: Saved) -> None:
    """The implementation may change at any time, however the weights are read."""
    model, path = copy.deepcopy(saved[0]), saved[1]
    with models.streamed(lambda: mixtral(first), path, memory_budget="20MiB") as streamed:
        for implementation in ("eager", "grouped_mm", "odewei", "batched_mm", "eager"):
            for one in (model, streamed):
                one.set_experts_implementation(implementation)
            inputs = tokens(7, 4)
            assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))


def test_taking_all_beyond_the_budget(saved: Saved) -> None:
    """A whole weight that the budget has no room for is right all the same, and the report says so."""
    model, path = copy.deepcopy(saved[0]), saved[1]
    with models.streamed(mixtral, path, memory_budget=TIGHT) as streamed:
        for one in (model, streamed):
            one.set_experts_implementation("grouped_mm")
        assert models.same_bits(models.outputs(streamed, tokens(1)), models.outputs(model, tokens(1)))
        assert odewei.report(streamed).overdrafts > 0


@pytest.mark.parametrize("kind", KINDS)
def test_ours_on_a_resident_model(kind: str) -> None:
    """For a model that is not streamed it is the eager implementation."""
    outputs = []
    for implementation in ONE_BY_ONE:
        model = models.resident(lambda implementation=implementation: KINDS[kind](implementation))
        outputs.append(models.outputs(model, tokens(1, 9)))
    assert models.same_bits(*outputs)


def test_ours_asks_for_all_routed_experts_at_once(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's experts are wanted together, in the order in which they are used, and no longer than that."""
    with models.streamed(lambda: mixtral("odewei"), saved[1], memory_budget=TIGHT) as streamed:
        runtime = runtime_of(streamed)
        wanted: list[list[str]] = []
        real = runtime.driver.want

        def noting(units: list[int]) -> None:
            wanted.append([runtime.driver.ledger.units[unit].name for unit in units])
            real(units)

        monkeypatch.setattr(runtime.driver, "want", noting)
        models.outputs(streamed, tokens(1))
        assert [len(names) for names in wanted] == [ROUTED, 0] * LAYERS
        for names in wanted[::2]:
            assert names == sorted(names, key=lambda name: int(name.rpartition("[")[2][:-1]))


def test_a_model_function_that_loads_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the function itself loads transformers, the name is known in time; any other error comes as itself."""
    registry = type(sys)("registry")
    calls: list[dict[str, object]] = []
    known: dict[str, object] = {}
    registry.ALL_EXPERTS_FUNCTIONS = type("Functions", (), {"register": known.__setitem__})
    monkeypatch.setattr(hf, "_REGISTRY", "tests.registry")

    def build() -> nn.Module:
        monkeypatch.setitem(sys.modules, "tests.registry", registry)
        calls.append(dict(known))
        if hf.NAME not in known:
            raise ValueError("not supported")
        return nn.Linear(1, 1)

    assert isinstance(hf.known_to_transformers(build)(), nn.Linear)
    assert [hf.NAME in known for known in calls] == [False, True]
    calls.clear()

    def fails() -> nn.Module:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hf.known_to_transformers(fails)()


def test_transformers_is_imported_by_nobody_here() -> None:
    """Neither importing odewei nor building a model of torch loads transformers."""
    code = (
        "import sys, torch, odewei, odewei.hf\n"
        "weights = {'weight': torch.ones(2, 2), 'bias': torch.ones(2)}\n"
        "odewei.close(odewei.init_on_demand_weights_model(lambda: torch.nn.Linear(2, 2), weights))\n"
        "assert 'transformers' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60, env=environment)


# -- the weight itself -----------------------------------------------------------------------------------------------

INDICES: list[object] = [
    0,
    63,
    -1,
    -64,
    64,
    -65,
    True,
    None,
    ...,
    slice(3, 5),
    (3, 4),
    (3, slice(None), 5),
    [1, 2],
    "place",
    1.5,
    torch.tensor(7),
    torch.tensor(-7, dtype=torch.int32),
    torch.tensor(99),
    torch.tensor([7]),
    torch.tensor([1, 1, 63]),
    torch.tensor(True),
    torch.tensor(3, dtype=torch.uint8),
    torch.tensor(1.0),
    torch.tensor(3).expand(2, 2),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_every_kind_of_index(index: object, saved: Saved) -> None:
    """Whatever the index: the resident weight's answer, or its error."""
    model, path = saved

    def answer(weight: torch.Tensor) -> object:
        try:
            return weight[index]
        except Exception as error:
            return type(error), str(error)

    with models.streamed(mixtral, path, memory_budget="8MiB", prefetch_depth=0) as streamed:
        got, expected = answer(experts_of(streamed).down_proj), answer(experts_of(model).down_proj)
        if isinstance(expected, torch.Tensor):
            assert isinstance(got, torch.Tensor)
            assert models.same_bits([got], [expected])
            assert (got.stride(), got.requires_grad) == (expected.stride(), expected.requires_grad)
        else:
            assert got == expected


def test_a_piece(saved: Saved) -> None:
    """It is a plain tensor at a multiple of 64 bytes, of the expert's bytes and no others, cast if asked."""
    model, path = saved
    for dtype in (torch.float32, torch.bfloat16):
        for io in ("buffered", "direct"):
            with models.streamed(mixtral, path, memory_budget="1GiB", prefetch_depth=0, dtype=dtype, io=io) as streamed:
                for place in (0, 5, 63):
                    piece = experts_of(streamed).gate_up_proj[place]
                    assert type(piece) is torch.Tensor
                    assert piece.data_ptr() % 64 == 0
                    assert models.same_bits([piece], [experts_of(model).gate_up_proj[place].detach().to(dtype)])
                if io == "buffered":
                    assert odewei.report(streamed).bytes_read == 3 * expert_bytes(model) // EXPERTS // LAYERS
                assert runtime_of(streamed).driver.ledger.leases() == 0


def test_what_is_not_a_piece_has_the_residents_bits(saved: Saved) -> None:
    """Functions, methods and operators on the weight run as on the resident parameter, to the last bit."""
    model, path = saved
    x = torch.randn(3, 64)
    with models.streamed(mixtral, path, memory_budget="8MiB", prefetch_depth=0) as streamed:
        for use in (
            lambda weight: x @ weight[3].T,
            lambda weight: F.linear(x, weight[torch.tensor(9)]),
            lambda weight: torch.bmm(x.expand(EXPERTS, 3, 64), weight.transpose(1, 2))[:5],
            lambda weight: weight.sum()[None],
            lambda weight: weight.take(torch.tensor([5, 9])),
            lambda weight: weight.select(0, 3),
            lambda weight: next(iter(weight)),
            lambda weight: torch.stack(weight.unbind()[:2]),
            lambda weight: torch.tensor([4, 2])[weight[0, 0, :2].argsort()],
            lambda weight: torch.from_numpy(weight.detach().numpy())[2],
            lambda weight: pickle.loads(pickle.dumps(weight))[2],
            lambda weight: copy.deepcopy(weight)[2],
            lambda weight: torch.func.vmap(lambda place: weight[place])(torch.tensor([1, 2])),
        ):
            try:
                expected = use(experts_of(model).gate_up_proj)
            except RuntimeError as error:  # older versions of torch cannot do all of this
                with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
                    use(experts_of(streamed).gate_up_proj)
                continue
            assert models.same_bits([use(experts_of(streamed).gate_up_proj)], [expected])


def test_describing_loads_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    """Code that asks the weight what it is hears what the resident one says, and no byte is read."""
    model, streamed = pair
    before = odewei.report(streamed).accesses
    expected = experts_of(model).gate_up_proj
    for got in (experts_of(streamed).gate_up_proj, dict(experts_of(streamed).named_parameters())["gate_up_proj"]):
        assert isinstance(got, nn.Parameter)
        assert isinstance(got, Placeholder)
        assert isinstance(got.home.part, SlicedWeight)
        for ask in (
            lambda weight: (weight.shape, weight.dtype, weight.device, weight.ndim, weight.requires_grad, len(weight)),
            lambda weight: (weight.size(1), weight.stride(), weight.numel(), weight.nbytes, weight.is_contiguous()),
        ):
            assert ask(got) == ask(expected)
        assert "gate_up_proj" in repr(got)
    assert odewei.report(streamed).accesses == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiling(saved: Saved) -> None:
    """torch.compile of code that takes experts is right for other ones, too."""
    model, path = saved
    with models.streamed(mixtral, path, memory_budget=TIGHT, prefetch_depth=0) as streamed, torch.no_grad():
        compiled = torch.compile(
            lambda x, place: F.linear(x, experts_of(streamed).gate_up_proj[place]), backend="eager"
        )
        for place in (3, 9, 3):
            x = torch.randn(2, 64)
            assert torch.equal(compiled(x, place), F.linear(x, experts_of(model).gate_up_proj[place]))
    torch._dynamo.reset()


# -- writing, gradients, threads, the end ----------------------------------------------------------------------------


def test_what_is_written_into_a_piece_stays(pair: tuple[nn.Module, nn.Module]) -> None:
    """No eviction loses it, other pieces do not see it, and the whole weight has it."""
    model, streamed = pair
    with torch.no_grad():
        for one in (model, streamed):
            for place in range(0, EXPERTS, 16):
                experts_of(one).gate_up_proj[place].mul_(2)
    for seed in range(4):
        inputs = tokens(seed, 8)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
    assert torch.equal(streamed.state_dict()["model.layers.1.mlp.experts.gate_up_proj"], experts_of(model).gate_up_proj)
    with torch.no_grad():
        for one in (model, streamed):
            experts_of(one).gate_up_proj[16].add_(1)
    assert torch.equal(experts_of(streamed).gate_up_proj[16], experts_of(model).gate_up_proj[16])
    assert torch.equal(experts_of(streamed).gate_up_proj + 0, experts_of(model).gate_up_proj)


def test_a_piece_that_was_kept_is_written_to(saved: Saved) -> None:
    """What is written into a piece after the whole weight was loaded is in the whole from its next use on."""
    model, path = copy.deepcopy(saved[0]), saved[1]
    with models.streamed(mixtral, path, memory_budget="8MiB", prefetch_depth=0) as streamed, torch.no_grad():
        for one in (model, streamed):
            piece = experts_of(one).down_proj[5]
            (experts_of(one).down_proj + 0).sum()
            for _ in range(2):
                piece.add_(3)
                assert torch.equal(experts_of(one).down_proj[5], piece)
        assert torch.equal(experts_of(streamed).down_proj + 0, experts_of(model).down_proj)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "setitem": lambda experts: experts.gate_up_proj.__setitem__((3, slice(96)), torch.ones(96, 64)),
    "in place": lambda experts: experts.gate_up_proj.mul_(2),
    "view": lambda experts: experts.gate_up_proj[3:4].copy_(torch.ones(192, 64)),
    "load_state_dict": lambda experts: experts.load_state_dict(
        {name: torch.ones(weight.shape) for name, weight in experts.named_parameters()}
    ),
}


@pytest.mark.parametrize("how", WRITES)
def test_what_is_written_into_the_whole_stays(how: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """Experts that are taken afterwards have it."""
    for one in pair:
        models.outputs(one, tokens(1, 4))
        with torch.no_grad():
            WRITES[how](experts_of(one))
    model, streamed = pair
    for seed in range(3):
        inputs = tokens(seed, 8)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))


def test_a_piece_that_somebody_has_does_not_leave(pair: tuple[nn.Module, nn.Module]) -> None:
    """What is written into it, or a view of it, passes later is not lost, and its memory is not taken twice."""
    model, streamed = pair
    kept = [experts_of(one).gate_up_proj[7][3:5] for one in (model, streamed)]
    for seed in range(4):
        inputs = tokens(seed, 32)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
    with torch.no_grad():
        for one in kept:
            one.mul_(3)
    del one, kept
    for seed in range(4):
        inputs = tokens(seed, 32)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
    assert odewei.report(streamed).overdrafts == 0


def test_gradients(pair: tuple[nn.Module, nn.Module]) -> None:
    """Gradients with respect to inputs are the resident model's."""
    model, streamed = pair
    model.requires_grad_(False)
    grads = []
    for one in (model, streamed):
        leaf = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        one(inputs_embeds=leaf).logits.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes(mode: Callable[[], object], pair: tuple[nn.Module, nn.Module]) -> None:
    """Inference mode and autocast give the resident model's bits, and pieces read there can be used elsewhere."""
    model, streamed = pair
    for _ in range(2):
        with mode():  # type: ignore[attr-defined]
            got, expected = (models.outputs(one, tokens(1, 5)) for one in (streamed, model))
        assert models.same_bits(got, expected)
        assert models.same_bits(models.outputs(streamed, tokens(1)), models.outputs(model, tokens(1)))


def test_two_threads(pair: tuple[nn.Module, nn.Module]) -> None:
    """Passes with other tokens at the same time are right, and none hangs."""
    model, streamed = pair
    expected = {seed: models.outputs(model, tokens(seed, 3)) for seed in range(2)}
    right: list[bool] = []

    def work(seed: int) -> None:
        right.extend(models.same_bits(models.outputs(streamed, tokens(seed, 3)), expected[seed]) for _ in range(8))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 16


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_an_expert(error: type[BaseException], pair: tuple[nn.Module, nn.Module]) -> None:
    """It returns every lease, nothing is wanted any more, and the next pass is right."""
    model, streamed = pair
    act = experts_of(streamed).act_fn

    def fail(module: nn.Module, args: object) -> None:
        raise error

    handle = act.register_forward_pre_hook(fail)
    with pytest.raises(error):
        models.outputs(streamed, tokens(1, 5))
    handle.remove()
    assert models.same_bits(models.outputs(streamed, tokens(2, 5)), models.outputs(model, tokens(2, 5)))
    assert runtime_of(streamed).driver.ledger.leases() == 0
    assert not runtime_of(streamed).driver.ledger.wants


def test_one_expert_at_a_time_is_leased(pair: tuple[nn.Module, nn.Module]) -> None:
    """Between the two uses of an expert it cannot leave; the one before it can."""
    _, streamed = pair
    runtime = runtime_of(streamed)
    seen: list[list[str]] = []

    def note(module: nn.Module, args: object) -> None:
        pieces = (record for record in runtime.account.units if record.name.startswith("model.layers.1.mlp.experts["))
        seen.append([record.name for record in pieces if record.leases])

    handle = experts_of(streamed).act_fn.register_forward_pre_hook(note)
    models.outputs(streamed, tokens(1, 9))
    handle.remove()
    assert len(seen) > 1
    assert all(len(names) == 1 for names in seen)
    assert len({names[0] for names in seen}) == len(seen)


def test_a_read_that_fails(saved: Saved, tmp_path: Path) -> None:
    """The error names the expert and the file; when the file is whole again, so is the model."""
    path = models.save(saved[0], tmp_path / "model.safetensors")
    whole, stat = path.read_bytes(), path.stat()
    with models.streamed(mixtral, path, memory_budget=TIGHT, prefetch_depth=0) as streamed:
        os.truncate(path, 1000)
        with pytest.raises(errors.WeightReadError, match=r"layers\.1\.mlp\.experts\[5\].*model\.safetensors"):
            experts_of(streamed).gate_up_proj[5]
        with open(path, "r+b") as file:
            file.write(whole)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert torch.equal(experts_of(streamed).gate_up_proj[5], experts_of(saved[0]).gate_up_proj[5])


def test_a_weight_replaced_by_the_user_is_the_users(pair: tuple[nn.Module, nn.Module]) -> None:
    """Assigning another parameter takes it out; the module's others are still read by experts."""
    model, streamed = pair
    new = torch.randn(EXPERTS, 64, 96)
    for one in (model, streamed):
        experts_of(one).down_proj = nn.Parameter(new.clone())
    for seed in range(3):
        inputs = tokens(seed, 4)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))


def test_materialize_and_close(pair: tuple[nn.Module, nn.Module]) -> None:
    """All experts are ordinary parameters afterwards, with what was written; a closed model says so."""
    model, streamed = pair
    with torch.no_grad():
        for one in (model, streamed):
            experts_of(one).gate_up_proj[3].mul_(2)
    weight = experts_of(streamed).gate_up_proj
    odewei.materialize(streamed)
    assert type(experts_of(streamed).gate_up_proj) is nn.Parameter
    assert models.same_bits(models.outputs(streamed, tokens(1, 8)), models.outputs(model, tokens(1, 8)))
    assert weight is experts_of(streamed).gate_up_proj


# -- the guess -------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """Takes all experts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, 32, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.expand(8, *x.shape), self.up.transpose(1, 2)).sum(0) + self.up[0].sum()


class Odd(nn.Module):
    """Experts of 65 * 33 elements, which the whole weight does not align."""

    def __init__(self, shape: tuple[int, ...] = (8, 65, 33)) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor, place: int = 3) -> torch.Tensor:
        return F.linear(x[:, : self.up.shape[2]], self.up[place])


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (Whole, 0),
        (Odd, 0),
        (lambda: Odd((8, 4, 16)), 0),
        (lambda: Odd((1, 64, 32)), 0),
        (lambda: Odd((8, 64, 32)), 1),
        (Fused, 1),
        (lambda: mixtral("grouped_mm"), 0),
        (mixtral, LAYERS),
    ],
    ids=["whole", "unaligned", "small", "one", "aligned", "own", "grouped", "eager"],
)
def test_what_is_taken_for_experts(build: Callable[[], nn.Module], found: int, tmp_path: Path) -> None:
    """Large weights of which the code takes single places, if these are aligned as in the whole weight."""
    model = models.resident(build)
    infos = SafetensorsLoader(models.save(model, tmp_path / "model.safetensors")).weights()
    plans = find_experts(model, survey(model), infos, lambda info: info.dtype)
    assert len(plans) == found
    if isinstance(model, Odd | Whole):
        with models.streamed(build, tmp_path / "model.safetensors") as streamed:
            x = {"x": torch.randn(3, 64)}
            if isinstance(model, Odd) and found == 0 and model.up.shape[0] == 1:
                x["place"] = 0
            assert models.same_bits(models.outputs(streamed, x), models.outputs(model, x))


def test_which_lists_hold_experts() -> None:
    """A list in a block whose holder chooses by values; neither a stack of layers nor a list that is run through."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    for kind, experts in ((Routing, EXPERTS * LAYERS), (Through, 0)):
        model = Stack(kind)
        weights = survey(model)
        units = partition(model, weights, {weight.name: weight.numel for weight in weights}, 1 << 30)
        found = listed_experts(model, units)
        assert sum(found) == experts
        assert all((".moe.experts." in unit.name) == is_one for unit, is_one in zip(units, found, strict=True))


class _Parts(nn.Module):
    """A block whose parts are in a list, and that looks at values: as T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.layer:
            x = part(x)
        return torch.where(torch.isinf(x), 0.0, x)


class _Alike(_Parts):
    """The same with parts of one class, which could be experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


@pytest.mark.parametrize(("block", "experts"), [(_Parts, 0), (_Alike, 4)])
def test_parts_of_a_block_are_no_experts(block: type[nn.Module], experts: int) -> None:
    """A list whose modules are of several classes is read ahead, like everything that each pass uses."""

    def build() -> nn.Module:
        return nn.Sequential(block(), block())

    state = {name: tensor.clone() for name, tensor in build().state_dict().items()}
    model = init_on_demand_weights_model(build, state, granularity="leaf", memory_budget="1MiB")
    runtime = odewei.runtime_of(model)
    assert len(runtime.units) - runtime.layout.ahead == experts
    odewei.close(model)
