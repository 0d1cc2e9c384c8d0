"""Names and options are looked up, and a wrong one is answered with the nearest right one."""

from __future__ import annotations

from typing import TypedDict

import pytest
from typing_extensions import Unpack

from megatron_replay.errors import ConfigError
from megatron_replay.registry import Registry, nearest


@pytest.fixture
def optimizers() -> Registry[object]:
    registry: Registry[object] = Registry("optimizer")

    @registry.register("moclip")
    class MoClip:
        def __init__(self, params: list[int], lr: float, *, max_angle: float = 45.0, scope: str = "global") -> None:
            self.got = (params, lr, max_angle, scope)

    @registry.register("adamw")
    class AdamW:
        def __init__(self, params: list[int], eps: float) -> None:
            self.got = (params, eps)

    @registry.register("any")
    class Anything:
        def __init__(self, *args: int, **options: int) -> None:
            self.got = (args, options)

    @registry.register("plain")
    class Plain:
        pass

    return registry


def test_a_name_leads_to_its_class(optimizers: Registry[object]) -> None:
    assert optimizers.get("moclip").__name__ == "MoClip"
    assert list(optimizers) == ["moclip", "adamw", "any", "plain"]


def test_build_passes_arguments_and_options(optimizers: Registry[object]) -> None:
    built = optimizers.build("moclip", [1], 0.1, max_angle=60.0)
    assert built.got == ([1], 0.1, 60.0, "global")  # type: ignore[attr-defined]
    assert optimizers.build("any", 1, x=2).got == ((1,), {"x": 2})  # type: ignore[attr-defined]
    assert type(optimizers.build("plain")) is optimizers.get("plain")


@pytest.mark.parametrize(
    ("name", "args", "options", "message"),
    [
        ("moclp", (), {}, "unknown optimizer 'moclp'; did you mean 'moclip'?"),
        ("sgd", (), {}, "unknown optimizer 'sgd'; known: moclip, adamw, any, plain"),
        (
            "moclip",
            ([], 0.1),
            {"max_angel": 60},
            "optimizer 'moclip' has no option 'max_angel'; did you mean 'max_angle'?",
        ),
        ("moclip", ([], 0.1), {"zzz": 1}, "optimizer 'moclip' has no option 'zzz'; known: max_angle, scope"),
        ("moclip", ([], 0.1), {"lr": 1}, "optimizer 'moclip' has no option 'lr'"),  # the program gave it
        ("adamw", ([],), {}, "optimizer 'adamw' needs option 'eps'"),
        ("plain", (), {"x": 1}, "optimizer 'plain' has no option 'x'; known: none"),
    ],
)
def test_a_wrong_name_or_option_is_answered(
    optimizers: Registry[object], name: str, args: tuple, options: dict, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizers.build(name, *args, **options)
    assert str(caught.value).startswith(message)


def test_one_name_is_one_class(optimizers: Registry[object]) -> None:
    with pytest.raises(AssertionError, match="'moclip' is registered twice"):
        optimizers.register("moclip")(int)


def test_nearest_falls_back_to_what_it_is_told() -> None:
    assert nearest("layot", ["layout", "batch"]) == "did you mean 'layout'?"
    assert nearest("zzz", ["layout"], otherwise="see --help") == "see --help"


def test_an_option_of_another_class_is_told_apart_from_a_mistake(optimizers: Registry[object]) -> None:
    assert optimizers.foreign("adamw", ["eps", "max_angle", "max_angel"]) == {"max_angle": "moclip"}


class Shared(TypedDict, total=False):
    decay: float


def test_options_of_an_unpacked_dictionary_are_known(optimizers: Registry[object]) -> None:
    @optimizers.register("derived")
    class Derived:
        def __init__(self, *, own: int = 0, **shared: Unpack[Shared]) -> None:
            self.got = (own, shared)

    assert optimizers.build("derived", own=1, decay=0.5).got == (1, {"decay": 0.5})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="has no option 'decai'; did you mean 'decay'"):
        optimizers.build("derived", decai=0.5)
