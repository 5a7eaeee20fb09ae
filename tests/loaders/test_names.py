"""From the checkpoint's names to the model's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odewei.errors import CheckpointError, MissingWeightError, OptionsError
from odewei.loaders.names import Names

FOUND = {"model.a": 1, "model.b": 2, "head": 3}


def test_without_a_wish_names_stay() -> None:
    """No prefix and no rename change nothing."""
    assert Names().apply(FOUND) == FOUND


def test_a_function_sees_what_is_left_of_a_name() -> None:
    """The prefix is taken off first, as written; None leaves a weight out; the order stays."""
    names = Names(lambda name: None if name == ".b" else f"x{name}", "model")
    assert list(names.apply(FOUND).items()) == [("x.a", 1)]
    assert list(Names({"b": "a", "a": "b"}, "model.").apply(FOUND).items()) == [("b", 1), ("a", 2)]


def test_two_weights_cannot_have_one_name() -> None:
    """A collision names both weights and their file, whether both are renamed or one keeps its name."""
    for rename in ({"model.a": "head"}, lambda name: "head"):
        with pytest.raises(CheckpointError, match=r"'model\.a' and '(head|model\.b)'.*called 'head'.*file 'f'"):
            Names(rename).apply(FOUND, file="f")


def test_what_is_renamed_must_be_there() -> None:
    """A mapping of a name that the checkpoint lacks is an error that lists names; so is a prefix of nothing."""
    with pytest.raises(MissingWeightError, match=r"'model\.a', 'model\.b', 'head'.*'model\.c'"):
        Names({"model.c": "c"}).apply(FOUND)
    with pytest.raises(MissingWeightError, match=r"the names are 'a', 'b' \("):
        Names({"model.a": "c"}, "model.").apply(FOUND)
    with pytest.raises(CheckpointError, match=r"begins with 'net\.'; the names are 'model\.a'"):
        Names(prefix="net.").apply(FOUND)


@pytest.mark.parametrize("wish", [{"prefix": 3}, {"rename": "a"}, {"rename": 3}])
def test_what_is_no_wish_is_refused(wish: dict[str, object]) -> None:
    """The error names the keyword."""
    with pytest.raises(OptionsError, match=next(iter(wish))):
        Names(**wish)  # type: ignore[arg-type]


def test_a_function_must_give_names() -> None:
    """What is neither a name nor None is refused with the weight."""
    with pytest.raises(OptionsError, match=r"gives 7, a int.*'model\.a'"):
        Names(lambda name: 7).apply(FOUND)  # type: ignore[arg-type, return-value]


@given(found=st.dictionaries(st.text("ab.", max_size=4), st.integers()), prefix=st.text("ab.", max_size=2))
def test_a_prefix_never_makes_two_names_one(found: dict[str, int], prefix: str) -> None:
    """Each weight that has the prefix is found without it, and no other."""
    expected = {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}
    if found and not expected:
        with pytest.raises(CheckpointError):
            Names(prefix=prefix).apply(found)
    else:
        assert Names(prefix=prefix).apply(found) == expected
