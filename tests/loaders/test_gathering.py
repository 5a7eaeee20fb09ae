"""Recipes: what they make is what torch.stack and torch.cat make, or is refused before anything is read."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from odewei.errors import CheckpointError, MissingWeightError, OptionsError, WeightMismatchError
from odewei.loaders import (
    Concat,
    GatheringLoader,
    NumpyLoader,
    Recipe,
    SafetensorsLoader,
    Stack,
    StateDictLoader,
    TorchLoader,
    WeightInfo,
    WeightsLoader,
    gathering,
    view_as_weight,
)
from odewei.loaders.gathering import cut_places, gather, lies_in_places
from tests.recipes import made_by_torch, recipes

from .conformance import LoaderConformance, assert_same, bits, random_tensor, read_bytes


class TestGatheringLoader(LoaderConformance):
    """The suite over a loader that makes each tensor that has rows of its rows."""

    has_spans = False

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> GatheringLoader:
        stored: dict[str, torch.Tensor] = {}
        made: dict[str, Recipe] = {}
        for name, tensor in tensors.items():
            if tensor.dim() and len(tensor):
                stored |= {f"{name}/{row}": part for row, part in enumerate(tensor)}
                made[name] = Stack(f"{name}/{row}" for row in range(len(tensor)))
            else:
                stored[name] = tensor
        names = {key: options.pop(key) for key in ("rename", "prefix") if key in options}
        return GatheringLoader(StateDictLoader(stored, **options), made, **names)


class TestWithoutRecipes(LoaderConformance):
    """The suite over a loader that gathers nothing: spans and all are those of the loader beneath."""

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> GatheringLoader:
        path = folder / "model.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        return GatheringLoader(SafetensorsLoader(path, **options), {})


def stored_as(kind: str, tensors: dict[str, torch.Tensor], folder: Path) -> WeightsLoader:
    """The tensors in a checkpoint of one kind."""
    match kind:
        case "safetensors":
            save_file(tensors, folder / "w.safetensors")
            return SafetensorsLoader(folder / "w.safetensors")
        case "fortran":  # strides of its own
            np.savez(
                folder / "w.npz", **{name: np.array(tensor.numpy(), order="F") for name, tensor in tensors.items()}
            )
            return NumpyLoader(folder / "w.npz")
        case "deflated":  # no spans
            np.savez_compressed(folder / "w.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
            return NumpyLoader(folder / "w.npz")
        case _:
            torch.save(tensors, folder / "w.pt")
            return TorchLoader(folder / "w.pt")


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=recipes(),
    kind=st.sampled_from(["safetensors", "fortran", "deflated", "torch"]),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.int64, torch.complex128]),
    piece=st.sampled_from([1, 16, 1 << 20]),
)
def test_what_a_recipe_makes_is_what_torch_makes(
    tmp_path: Path, case: tuple[Recipe, dict[str, tuple[int, ...]]], kind: str, dtype: torch.dtype, piece: int
) -> None:
    """Any nesting of stacks and concatenations, along any dimension, of sources stored in any way, has torch's bits."""
    recipe, shapes = case
    if kind == "safetensors" and dtype is torch.complex128:
        dtype = torch.complex64
    tensors = {name: random_tensor(dtype, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    expected = made_by_torch(recipe, tensors)
    loader = GatheringLoader(stored_as(kind, tensors, tmp_path), {"made": recipe})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "_PIECE_NBYTES", piece)
        found = loader("module", ["made"])["made"]
    assert_same(found, expected)
    assert found.is_contiguous()


@given(case=recipes())
def test_the_parts_fill_a_weight_each_element_once(case: tuple[Recipe, dict[str, tuple[int, ...]]]) -> None:
    """The stretches of all parts cover the gathered weight without gap or overlap, and their sources too."""
    recipe, shapes = case
    known = {name: WeightInfo(name, torch.int16, shape, None) for name, shape in shapes.items()}
    info = gather("made", recipe, known)
    covered: list[tuple[int, int]] = []
    for part in info.parts:
        runs = list(part.runs())
        assert len(runs) == part.run_count
        assert sum(nbytes for _, _, nbytes in runs) == part.source.nbytes
        assert [start for start, _, _ in runs] == [index * nbytes for index, (_, _, nbytes) in enumerate(runs)]
        covered += [(at, at + nbytes) for _, at, nbytes in runs if nbytes]
    covered.sort()
    assert [start for start, _ in covered] == [0, *(end for _, end in covered)][: len(covered)]
    assert (covered[-1][1] if covered else 0) == info.nbytes


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=recipes(), kind=st.sampled_from(["safetensors", "deflated"]))
def test_places_are_read_by_themselves(
    tmp_path: Path, case: tuple[Recipe, dict[str, tuple[int, ...]]], kind: str
) -> None:
    """Where no source reaches over several places of the first dimension, each is a weight with its bits."""
    recipe, shapes = case
    tensors = {name: random_tensor(torch.float16, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    loader = GatheringLoader(stored_as(kind, tensors, tmp_path), {"made": recipe})
    info, expected = loader.weights()["made"], made_by_torch(recipe, tensors)
    if isinstance(recipe, Stack) and recipe.dim % expected.dim() == 0 and expected.numel():
        assert lies_in_places(info)
    if lies_in_places(info):
        for place, piece in enumerate(cut_places(info)):
            assert (piece.name, piece.dtype) == (f"made[{place}]", torch.float16)
            raw = torch.tensor(list(read_bytes(loader, piece)), dtype=torch.uint8)
            assert_same(view_as_weight(raw, piece), expected[place])


def test_what_lies_in_places(tmp_path: Path) -> None:
    """A stretch of a file does, and what is stacked of them; what has strides or reaches over places does not."""
    known = stored_as("safetensors", TENSORS, tmp_path).weights()
    assert lies_in_places(known["a"])
    assert [piece.span.offset for piece in cut_places(known["a"]) if piece.span is not None] == [
        known["a"].span.offset + 12 * place for place in range(2) if known["a"].span is not None
    ]
    assert lies_in_places(gather("m", Stack(["a", "b"]), known))
    assert lies_in_places(gather("m", Concat([Stack(["a"]), Stack(["b"])]), known))
    assert not lies_in_places(gather("m", Concat(["a", "b"]), known))
    assert not lies_in_places(gather("m", Stack(["a", "b"], dim=1), known))
    assert not lies_in_places(stored_as("fortran", TENSORS, tmp_path).weights()["a"])
    assert not lies_in_places(StateDictLoader(TENSORS).weights()["a"])


TENSORS = {"a": torch.zeros(2, 3), "b": torch.ones(2, 3), "c": torch.ones(2, 4), "h": torch.ones(2, 3).half()}


@pytest.mark.parametrize(
    ("recipe", "kind", "problem"),
    [
        (Stack(["a", "x"]), MissingWeightError, r"recipe for 'made'.*does not have.*weight 'x'"),
        (Stack(["a", "h"]), WeightMismatchError, r"'h' has torch\.float16, 'a' has torch\.float32"),
        (Stack(["a", "c"]), WeightMismatchError, r"'c' has shape \(2, 4\).*'a' \(2, 3\)"),
        (Concat(["a", "c"]), WeightMismatchError, r"'c' has shape"),
        (Concat(["a", Stack(["b", "a"])]), WeightMismatchError, r"'b' has shape \(2, 2, 3\)"),
        (Concat(["a", "b"], dim=2), WeightMismatchError, "no dimension 2 for Concat of 2-dim"),
        (Stack(["a", "b"], dim=-4), WeightMismatchError, "no dimension -4 for Stack of 2-dim"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: Recipe, kind: type[CheckpointError], problem: str) -> None:
    """The error names the gathered weight, the source and what is wrong with it, and comes with the headers."""
    loader = GatheringLoader(StateDictLoader(TENSORS), {"made": recipe})
    with pytest.raises(kind, match=problem) as caught:
        loader.weights()
    assert caught.value.cure


def test_names_do_not_collide() -> None:
    """A recipe may take the name of a source of its own, and not that of a weight that is there."""
    loader = GatheringLoader(StateDictLoader(TENSORS), {"a": Concat(["a", "b"])})
    assert loader.weights().keys() == {"a", "c", "h"}
    assert_same(loader("module", ["a"])["a"], torch.cat([TENSORS["a"], TENSORS["b"]]))
    with pytest.raises(CheckpointError, match=r"that the checkpoint has.*'c'"):
        GatheringLoader(StateDictLoader(TENSORS), {"c": Concat(["a", "b"])}).weights()


def test_renaming_comes_before_and_after() -> None:
    """Recipes use the names that the loader beneath gives; those that the model gets can be changed once more."""
    inner = StateDictLoader({f"x.{name}": tensor for name, tensor in TENSORS.items()}, prefix="x.", rename={"a": "d"})
    loader = GatheringLoader(inner, {"made": Stack(["d", "b"])}, rename={"made": "m", "h": None})
    assert loader.weights().keys() == {"m", "c"}
    assert [part.source.name for part in loader.weights()["m"].parts] == ["x.a", "x.b"]


def test_a_source_may_be_used_twice() -> None:
    """One source can be in several recipes, and in one several times."""
    made = {"one": Stack(["a", "b", "a"], dim=-1), "two": Concat(["b", "b"])}
    found = GatheringLoader(StateDictLoader(TENSORS), made)("module", ["one", "two"])
    assert_same(found["one"], torch.stack([TENSORS["a"], TENSORS["b"], TENSORS["a"]], dim=-1))
    assert_same(found["two"], torch.cat([TENSORS["b"], TENSORS["b"]]))


@pytest.mark.parametrize("sources", ["ab", [], 3, ["a", 1], [None]])
@pytest.mark.parametrize("kind", [Stack, Concat])
def test_what_is_no_recipe_is_refused_at_once(kind: Any, sources: Any) -> None:
    """One name instead of a list, nothing, or something else."""
    with pytest.raises(OptionsError, match="is no recipe"):
        kind(sources)
    with pytest.raises(OptionsError, match="is no recipe"):
        kind(["a"], dim="0")
    with pytest.raises(OptionsError, match="is no recipe by a name"):
        GatheringLoader(StateDictLoader(TENSORS), {"made": sources})


def test_recipes_and_infos_are_data(tmp_path: Path) -> None:
    """They compare by value and come back from pickle; the infos of gathered weights know their parts' file."""
    recipe = Stack([Concat(["a", "b"], dim=1)])
    assert pickle.loads(pickle.dumps(recipe)) == recipe == Stack((Concat(("a", "b"), 1),), 0)
    info = GatheringLoader(stored_as("safetensors", TENSORS, tmp_path), {"made": recipe}).weights()["made"]
    assert pickle.loads(pickle.dumps(info)) == info
    assert info.file == str(tmp_path / "w.safetensors")
    assert gather("made", recipe, StateDictLoader(TENSORS).weights()).file is None


def test_gathering_in_pieces_reads_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large source that goes to many places is read by rows of 1 MiB, never whole."""
    tensors = {name: random_tensor(torch.float32, (3000, 512), seed) for seed, name in enumerate("ab")}
    loader = GatheringLoader(stored_as("safetensors", tensors, tmp_path), {"made": Concat(["a", "b"], dim=1)})
    read: list[int] = []
    plain = gathering.read_span

    def watched(info: WeightInfo, buffer: memoryview) -> None:
        read.append(buffer.nbytes)
        plain(info, buffer)

    monkeypatch.setattr(gathering, "read_span", watched)
    assert read_bytes(loader, loader.weights()["made"]) == bits(torch.cat([tensors["a"], tensors["b"]], dim=1))
    assert sum(read) == 2 * 3000 * 512 * 4
    assert max(read) <= 1 << 20
