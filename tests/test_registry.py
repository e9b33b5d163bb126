"""Registries find components by name; components refuse what they do not know."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from tuner.errors import StudyFileError, UnknownNameError, shown, unknown_name
from tuner.registry import Registry, checked, component

TOYS: Registry[Any] = Registry("toy")


@component
class Wheel:
    """A wheel."""

    spokes: Annotated[int, Field(ge=3)] = 8


@TOYS.register("cart")
@component
class Cart:
    """A cart with wheels."""

    speed: Annotated[float, Field(ge=0)] = 1.0
    colour: Literal["red", "blue"] = "red"
    wheel: Wheel = Wheel()
    loads: tuple[float, ...] = ()
    painted: bool = False


@TOYS.register("kite")
@component
class Kite:
    """A kite, which needs a string."""

    length: float


def complaint(values: dict[str, Any], name: str = "cart") -> str:
    with pytest.raises(StudyFileError) as caught:
        TOYS.parse(name, values, where="toys.toml: toy")
    return str(caught.value)


def test_registry_lists_its_names_in_order_and_finds_classes_both_ways() -> None:
    assert list(TOYS) == ["cart", "kite"]
    assert "cart" in TOYS
    assert "boat" not in TOYS
    assert TOYS["kite"] is Kite
    assert TOYS.name_of(Kite(length=3)) == "kite"


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="'cart' is registered already"):
        TOYS.register("cart")(Cart)


def test_unknown_name_says_which_was_meant() -> None:
    with pytest.raises(UnknownNameError, match="unknown toy 'card'; did you mean 'cart'"):
        TOYS["card"]
    assert "did you mean 'kite'? Known: cart, kite" in complaint({}, "Kites")


def test_parsing_fills_in_defaults_and_turns_lists_into_tuples() -> None:
    cart = TOYS.parse("cart", {"speed": 2, "loads": [1, 2.5], "wheel": {"spokes": 5}}, where="t")
    assert cart == Cart(speed=2.0, loads=(1.0, 2.5), wheel=Wheel(spokes=5))
    assert isinstance(cart.speed, float)


def test_components_are_frozen_keyword_only_and_validated_in_python_too() -> None:
    cart = Cart()
    with pytest.raises(FrozenInstanceError):
        cart.speed = 3.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        replace(cart, speed=-1.0)
    with pytest.raises(ValidationError):
        Cart(sped=3.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Cart(3.0)  # type: ignore[call-arg]
    assert hash(cart) == hash(Cart())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"sped": 2},
            "toy.sped: unknown key; did you mean 'speed'? Known: colour, loads, painted,",
        ),
        (
            {"wheel": {"spoke": 5}},
            "toy.wheel.spoke: unknown key; did you mean 'spokes'? Known: spok",
        ),
        ({"speed": -1}, "toy.speed = -1: must be at least 0"),
        ({"speed": "fast"}, 'toy.speed = "fast": must be a number'),
        ({"speed": "3"}, 'toy.speed = "3": must be a number, without quotes'),
        ({"speed": True}, "toy.speed = true: must be a number"),
        ({"speed": float("inf")}, "toy.speed = inf: must be a finite number"),
        ({"colour": "green"}, "toy.colour = \"green\": must be 'red' or 'blue'"),
        ({"wheel": 3}, "toy.wheel = 3: must be a table"),
        ({"wheel": {"spokes": 3.5}}, "toy.wheel.spokes = 3.5: must be a whole number"),
        ({"wheel": {"spokes": True}}, "toy.wheel.spokes = true: must be"),
        ({"loads": 3}, "toy.loads = 3: must be a list"),
        ({"loads": [1, "2"]}, 'toy.loads[1] = "2": must be a number, without quotes'),
        ({"painted": 1}, "toy.painted = 1: must be true or false"),
        ({"painted": "yes"}, 'toy.painted = "yes": must be true or false'),
    ],
)
def test_wrong_value_says_where_it_is_and_what_is_right(values: dict[str, Any], said: str) -> None:
    text = complaint(values)
    assert text.startswith("toys.toml: toy.")
    assert said in text
    assert len(text.splitlines()) == 1


def test_missing_key_is_named() -> None:
    assert complaint({}, "kite") == "toys.toml: toy.length is missing"


def test_every_mistake_has_its_line() -> None:
    lines = complaint({"speed": -1, "colour": "green", "size": 3}).splitlines()
    assert sorted(line.split()[1].rstrip(":") for line in lines) == [
        "toy.colour",
        "toy.size",
        "toy.speed",
    ]


def test_alternatives_of_one_value_share_a_line() -> None:
    with pytest.raises(StudyFileError) as caught:
        checked(int | str, 0.5, "x")
    assert str(caught.value) == "x = 0.5: must be a whole number or a text in quotes"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (3, "3"),
        (float("nan"), "nan"),
        ("a\n", '"a\\n"'),
        ("é", '"é"'),
        ([1, "a"], '[1, "a"]'),
        ({"low": 0, "high": [1]}, "{ low = 0, high = [1] }"),
        ({}, "{}"),
    ],
)
def test_values_are_shown_as_the_file_has_them(value: object, text: str) -> None:
    assert shown(value) == text


def test_smote_is_refused_with_a_reason_everywhere() -> None:
    assert "ghost image" in unknown_name("sampler", "SMOTE", ["natural"])


def test_smote_refusal_says_what_mixup_does_otherwise() -> None:
    text = unknown_name("sampler", "SMOTE", ["natural"])
    assert "one hard label" in text
    assert "mixup mixes the labels with the pixels" in text
