"""Named builders: methods, networks, data sets and solvers are all looked up, checked and built here.

A builder is a class or a function. Its positional parameters come from the engine, its keyword-only parameters from
the configuration: their annotations are the schema. A ``**shared`` parameter of a class stands for the keyword-only
parameters of the next class in its method resolution order.

A name with a slash, ``library/name``, is looked up in a library when it is first asked for; its builder checks its
arguments by itself.
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, Protocol, TypeVar, get_type_hints, runtime_checkable

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mdistill.errors import UserError, shown, suggestion

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Builder = TypeVar("Builder", bound=Callable[..., Any])

Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@runtime_checkable
class LibraryBuilder(Protocol[T_co]):
    """A builder of a library, whose arguments no signature tells."""

    def __call__(self, *args: Any, **arguments: Any) -> T_co: ...

    def problems(self, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What is wrong with ``arguments``: the key ("" where it is none alone) and one line each."""


class Registry(Generic[T]):
    """A table from names to builders of ``kind`` (a word for messages: "model", "method", "data set")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._builders: dict[str, Callable[..., T]] = {}
        self._canonical: dict[str, str] = {}
        self._libraries: dict[str, Callable[[str], LibraryBuilder[T]]] = {}

    def add_library(self, prefix: str, find: Callable[[str], LibraryBuilder[T]]) -> None:
        """Look up names that begin with ``prefix`` and a slash by ``find``, which gets what follows.

        ``find`` raises UserError for a name that its library lacks; nothing is imported before it is called.
        """
        self._libraries[prefix] = find

    def register(self, name: str, *aliases: str) -> Callable[[Builder], Builder]:
        """Decorator: make the class or function known under ``name`` (and ``aliases``, which resolve to it)."""

        def add(builder: Builder) -> Builder:
            for key in (name, *aliases):
                if key in self._canonical:
                    raise UserError(
                        f"{self.kind} {key!r} is registered twice: by {_origin(self._builders[self._canonical[key]])}"
                        f" and by {_origin(builder)}"
                    )
            self._builders[name] = builder
            self._canonical.update(dict.fromkeys((name, *aliases), name))
            return builder

        return add

    def names(self) -> list[str]:
        """The canonical names, sorted."""
        return sorted(self._builders)

    def canonical(self, name: str, where: str = "") -> str:
        """The canonical form of ``name``.

        Raises:
            UserError: no such name; says the nearest one and all that are known.
        """
        prefix, _, rest = name.partition("/")
        if rest and prefix in self._libraries:
            self._libraries[prefix](rest)
            return name
        if name not in self._canonical:
            place = f" in {where}" if where else ""
            libraries = [f"{library}/NAME" for library in self._libraries]
            misspelt = suggestion(prefix, self._libraries) if rest else ""
            raise UserError(
                f"unknown {self.kind} {name!r}{place}{misspelt or suggestion(name, self._canonical)}"
                f" (known: {', '.join([*self.names(), *libraries])})"
            )
        return self._canonical[name]

    def get(self, name: str, where: str = "") -> Callable[..., T]:
        """The builder registered under ``name``."""
        canonical = self.canonical(name, where)
        prefix, _, rest = canonical.partition("/")
        return self._libraries[prefix](rest) if rest else self._builders[canonical]

    def arguments(self, name: str) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters that the configuration may set, with resolved annotations; no library's."""
        builder = self.get(name)
        return {} if isinstance(builder, LibraryBuilder) else _keyword_parameters(builder)

    def check(
        self, name: str, arguments: Mapping[str, Any], *, where: str = "", beside: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], list[str]]:
        """Validate ``arguments`` against the builder's keyword-only parameters.

        Args:
            where: prefix of every problem, such as ``"configs/x.yaml: distiller."``.
            beside: other keys that are legal at the same place, for the suggestion.

        Returns:
            the complete arguments (checked, defaults filled in; one that is not plain data, such as a class, stays the
            builder's own) and all problems found, one line each.
        """
        builder = self.get(name)
        if isinstance(builder, LibraryBuilder):
            found = builder.problems(arguments)
            return dict(arguments), [f"{where + key if key else where.rstrip('. ')}: {text}" for key, text in found]
        parameters = self.arguments(name)
        complete: dict[str, Any] = {}
        problems = [
            f"{where}{key}: unknown key (value {shown(value)}) for {self.kind} {name!r}"
            f"{suggestion(key, [*parameters, *beside])} (allowed: {', '.join([*beside, *parameters]) or 'none'})"
            for key, value in arguments.items()
            if key not in parameters
        ]
        for key, parameter in parameters.items():
            if key in arguments:
                try:
                    complete[key] = _checked(parameter.annotation, arguments[key])
                except ValidationError as error:
                    problems += [f"{where}{line}" for line in problem_lines(error, key)]
            elif parameter.default is inspect.Parameter.empty:
                problems.append(f"{where}{key}: missing; {self.kind} {name!r} needs it")
            elif _is_plain(parameter.default):
                complete[key] = parameter.default
        return complete, problems

    def build(self, name: str, *args: Any, where: str = "", **arguments: Any) -> T:
        """Build ``name`` from the engine's positional ``args`` and checked keyword ``arguments``.

        Raises:
            UserError: unknown name, or every unknown, missing and ill-typed argument together.
        """
        builder = self.get(name, where)
        complete, problems = self.check(name, arguments, where=f"{where}: " if where else "")
        if problems:
            raise UserError("\n".join(problems))
        return builder(*args, **complete)


def problem_lines(error: ValidationError, key: str = "") -> list[str]:
    """One line for each thing pydantic found wrong: dotted key, what is required, the value found."""
    lines = []
    for detail in error.errors():
        place = ".".join(part for part in (key, *(str(step) for step in detail["loc"])) if part)
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        lines.append(f"{place}{': ' if place else ''}{message}, found {shown(detail['input'])}")
    return lines


def import_submodules(package: str, path: list[str]) -> None:
    """Import every module of a package, so that a new file registers itself by being there."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _checked(annotation: Any, value: Any) -> Any:
    """``value`` as ``annotation`` wants it: lists may be tuples and text a path, but text is no number, nor is a bool.

    Raises:
        ValidationError: it is not.
    """
    if annotation is inspect.Parameter.empty:
        return value
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    return adapter.validate_json(json.dumps(value, default=str), strict=True)


def _is_plain(value: Any) -> bool:
    """Whether YAML can hold ``value``."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _keyword_parameters(builder: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    if not inspect.isclass(builder):
        functions: list[Callable[..., Any]] = [builder]
    else:
        functions = [cls.__dict__["__init__"] for cls in builder.__mro__ if "__init__" in cls.__dict__]
    found: dict[str, inspect.Parameter] = {}
    for function in functions:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in found:
                found[parameter.name] = parameter.replace(annotation=hints.get(parameter.name, inspect.Parameter.empty))
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _origin(builder: Callable[..., Any]) -> str:
    return f"{builder.__module__}.{getattr(builder, '__qualname__', builder)}"
