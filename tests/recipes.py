"""Random recipes, and what torch makes of them. Shared by the tests of loaders and of plans."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from odewei.loaders import Concat, Recipe, Stack

Shapes = dict[str, tuple[int, ...]]


@st.composite
def recipes(draw: st.DrawFn, longest: int = 3, times: int = 1) -> tuple[Recipe, Shapes]:
    """A recipe and the shapes of its sources; no size of what it makes is above ``longest``, and the last one not above
    ``times`` as much.
    """
    shapes: Shapes = {}
    sizes = st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, longest)

    def leaf(shape: tuple[int, ...]) -> str:
        name = f"w{len(shapes)}"
        shapes[name] = shape
        return name

    def made(shape: tuple[int, ...], depth: int, *, whole: bool = False) -> Recipe | str:
        """Something of this shape; ``whole``: no bare source."""
        if not whole and (not depth or draw(st.booleans())):
            return leaf(shape)
        dims = [dim for dim, size in enumerate(shape) if size]
        if not dims:
            return Concat([leaf(shape), leaf(shape)], 0) if shape else leaf(shape)
        dim = draw(st.sampled_from(dims))
        signed = dim - len(shape) if draw(st.booleans()) else dim
        if shape[dim] <= longest and draw(st.booleans()):
            rest = (*shape[:dim], *shape[dim + 1 :])
            return Stack([made(rest, depth - 1) for _ in range(shape[dim])], signed)
        cut = draw(st.integers(0, shape[dim]))
        pieces = [size for size in (cut, shape[dim] - cut) if size]
        return Concat([made((*shape[:dim], size, *shape[dim + 1 :]), depth - 1) for size in pieces], signed)

    *first, last = draw(st.lists(sizes, min_size=1, max_size=4))
    shape = (*first, last * draw(st.integers(1, times)))
    found = made(shape, 3, whole=True)
    assert not isinstance(found, str)
    return found, shapes


def made_by_torch(recipe: Recipe | str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The plain way."""
    if isinstance(recipe, str):
        return tensors[recipe]
    sources = [made_by_torch(source, tensors) for source in recipe.sources]
    return torch.stack(sources, recipe.dim) if isinstance(recipe, Stack) else torch.cat(sources, recipe.dim)
