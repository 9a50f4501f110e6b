import pytest

from mdistill.errors import UserError
from mdistill.registry import NonNegativeInt, Positive, Registry


class Base:
    def __init__(self, first: int, *, shared: bool = False, weight: Positive) -> None:
        self.first, self.shared, self.weight = first, shared, weight


@pytest.fixture
def registry() -> Registry[Base]:
    made: Registry[Base] = Registry("thing")

    @made.register("child", "kid")
    class Child(Base):
        def __init__(self, first: int, *, size: NonNegativeInt | None, **shared: object) -> None:
            super().__init__(first, **shared)
            self.size = size

    return made


def test_builds_with_arguments_of_the_whole_class_hierarchy(registry: Registry[Base]) -> None:
    built = registry.build("kid", 7, size=None, weight=2)
    assert (built.first, built.size, built.weight, built.shared) == (7, None, 2.0, False)


def test_unknown_name_suggests_and_lists(registry: Registry[Base]) -> None:
    with pytest.raises(UserError, match=r"unknown thing 'chld' in x.yaml; did you mean 'child'\? \(known: child\)"):
        registry.get("chld", "x.yaml")


def test_duplicate_name_names_both_origins(registry: Registry[Base]) -> None:
    with pytest.raises(UserError, match=r"thing 'kid' is registered twice: by .*Child and by .*Base"):
        registry.register("kid")(Base)


def test_all_argument_problems_are_reported_together(registry: Registry[Base]) -> None:
    with pytest.raises(UserError) as caught:
        registry.build("child", 1, where="x.yaml", siez=3, weight=-1.0, shared=1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "x.yaml: siez: unknown key (value 3)" in lines[0]
    assert "did you mean 'size'" in lines[0]
    assert any("size: missing" in line for line in lines)
    assert any("weight: should be greater than 0, found -1.0" in line for line in lines)
    assert any("shared: should be a valid boolean, found 1" in line for line in lines)


@pytest.mark.parametrize("value", [True, "2", float("nan"), float("inf"), None])
def test_a_number_is_neither_boolean_nor_text_nor_infinite(registry: Registry[Base], value: object) -> None:
    with pytest.raises(UserError, match=r"weight: .*found"):
        registry.build("child", 1, size=0, weight=value)


def test_check_fills_defaults_in(registry: Registry[Base]) -> None:
    complete, problems = registry.check("child", {"size": 3, "weight": 1})
    assert problems == []
    assert complete == {"size": 3, "weight": 1.0, "shared": False}
