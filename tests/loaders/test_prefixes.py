"""Names that differ by a wrapper are brought together where only one reading fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odewei.loaders.prefixes import find_prefix, find_readings

MODEL = ("0.weight", "0.bias", "head.0.weight")


@pytest.mark.parametrize("prefix", ["module.", "model.", "state_dict.", "params_ema.", "net.module.", "a.b.c."])
def test_a_prefix_of_all_names_is_taken_off(prefix: str) -> None:
    """Whatever was put before every name is found, by itself and with ``_orig_mod`` in any place."""
    assert find_prefix([prefix + name for name in MODEL], MODEL) == {prefix + name: name for name in MODEL}
    wrapped = {f"_orig_mod.{prefix}{name.replace('.', '._orig_mod.', 1)}": name for name in MODEL}
    assert find_prefix(wrapped, MODEL) == wrapped


def test_a_prefix_that_the_model_has_is_added() -> None:
    """A checkpoint of the bare model fits a model that holds it as its only part, also out of a container."""
    model = ["net." + name for name in MODEL]
    assert find_prefix(MODEL, model) == {name: "net." + name for name in MODEL}
    assert find_prefix(["module." + name for name in MODEL], model) == {
        "module." + name: "net." + name for name in MODEL
    }


def test_a_model_that_is_wrapped_itself_gets_its_own_names() -> None:
    """Wrappers on the model's side are no hindrance."""
    model = ["_orig_mod." + name for name in MODEL]
    assert find_prefix(MODEL, model) == {name: "_orig_mod." + name for name in MODEL}
    assert find_prefix(["module." + name for name in MODEL], model) == {
        "module." + name: "_orig_mod." + name for name in MODEL
    }


def test_names_that_fit_are_left_alone() -> None:
    """None is returned where every weight is found as it is, whatever else the checkpoint has."""
    assert find_prefix([*MODEL, *("ema." + name for name in MODEL)], MODEL) is None
    assert find_prefix([], []) is None


def test_two_readings_are_none() -> None:
    """Where two prefixes lead to all weights nothing is chosen, and both can be told."""
    names = [prefix + name for prefix in ("params.", "params_ema.") for name in MODEL]
    assert find_prefix(names, MODEL) is None
    assert [str(reading) for reading in find_readings(names, MODEL)] == [
        "without the prefix 'params.'",
        "without the prefix 'params_ema.'",
    ]


def test_only_the_part_that_has_all_weights_is_read() -> None:
    """Of a generator and a discriminator the one whose names are the model's is taken, and the rest left out."""
    names = [*("generator." + name for name in MODEL), "discriminator.0.weight", "discriminator.0.bias", "epoch"]
    assert find_prefix(names, MODEL) == {"generator." + name: name for name in MODEL}


def test_what_the_model_does_not_name_keeps_its_place() -> None:
    """Buffers and whatever else lies behind the prefix is renamed too."""
    found = find_prefix([*("module." + name for name in MODEL), "module.0.running_mean"], MODEL)
    assert found is not None
    assert found["module.0.running_mean"] == "0.running_mean"


def test_nothing_is_renamed_that_has_a_name_of_its_own() -> None:
    """A head is not taken for another layer only because both have a weight and a bias."""
    assert find_prefix(["head.weight", "head.bias"], ["fc.weight", "fc.bias"]) is None


def test_a_tied_weight_may_be_under_its_other_name() -> None:
    """One name of a tied weight is enough; without it no reading finds all."""
    names, model = ["module.embed.weight", "module.0.weight"], ["lm_head.weight", "0.weight"]
    assert find_prefix(names, model) is None
    found = find_prefix(names, model, aliases={"lm_head.weight": ["embed.weight"]})
    assert found == {"module.embed.weight": "embed.weight", "module.0.weight": "0.weight"}


def test_missing_weights_are_allowed_on_demand() -> None:
    """With ``partial`` the reading that finds the most is taken, unless names fit as they are."""
    names = ["module.0.weight", "module.0.bias", "other.0.weight"]
    assert find_prefix(names, MODEL) is None
    assert find_prefix(names, MODEL, partial=True) == {"module.0.weight": "0.weight", "module.0.bias": "0.bias"}
    assert find_prefix([*names, "0.bias"], MODEL, partial=True) is None


def test_many_prefixes_take_little() -> None:
    """A checkpoint with a prefix for each of its names is given up soon."""
    assert find_prefix([f"p{number}.0.weight" for number in range(20_000)], MODEL) is None


@given(
    st.lists(st.text("ab._", min_size=1, max_size=9), max_size=8),
    st.lists(st.text("ab.", min_size=1, max_size=6), max_size=4),
)
def test_any_names_are_taken(names: list[str], model: list[str]) -> None:
    """No names are an error; what is returned maps names of the checkpoint, no two to one, to all of the model's."""
    found = find_prefix(names, model)
    if found is not None:
        assert found.keys() <= set(names)
        assert len(set(found.values())) == len(found)
        assert set(model) <= set(found.values())
