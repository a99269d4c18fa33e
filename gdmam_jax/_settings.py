"""Choices that carry their own numbers: called with settings alone, they return a new choice."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Choice(functools.partial):
    """A function with settings; one that has a value for each loss may be a mapping by name."""

    def for_losses(self, names: tuple[str, ...]) -> "Choice":
        """The same, with mappings put into the order of these names of the alignment losses."""
        found = {
            key: in_order(f"{self.func.__name__}'s {key}", value, names)
            for key, value in self.keywords.items()
            if isinstance(value, Mapping)
        }
        return Choice(self.func, *self.args, **self.keywords | found)


def in_order(what: str, numbers: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    """The values of a mapping, in the order of the names; the prediction's first, if it is there.

    Raises:
      ValueError: a name is unknown or missing.
    """
    order = ("prediction",) * ("prediction" in numbers) + names
    if {*order} != {*numbers}:
        known = ", ".join(names) or "no names: give them in a dictionary, or numbers in order"
        raise ValueError(f"{what} names {', '.join(map(str, numbers))}; the losses have {known}")
    return tuple(numbers[name] for name in order)


class _Default:
    """A function as the default of an argument, not callable itself.

    `optax.inject_hyperparams` treats callable defaults as schedules.
    """

    def __init__(self, function: Any):
        self.function = function

    def __repr__(self) -> str:
        return self.function.__name__


def default(function: T) -> T:
    """A choice as an argument's default, which signatures show by its name; see `chosen`."""
    return _Default(function)  # type: ignore[return-value]


def chosen(choice: T) -> T:
    """What was chosen, even if that is an argument's default."""
    return choice.function if isinstance(choice, _Default) else choice


def with_settings(
    function: Callable[..., Any], check: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Lets a choice be called with settings alone, which returns a choice with these settings.

    Args:
      function: the choice; its settings are keyword-only arguments.
      check: raises an error if the settings are not valid.
    """
    signature = inspect.signature(function)
    named = {name for name, each in signature.parameters.items() if each.kind != each.KEYWORD_ONLY}

    @functools.wraps(function)
    def wrapped(*arrays: Any, **settings: Any) -> Any:
        if arrays or named & {*settings}:
            return function(*arrays, **settings)
        bound = signature.bind_partial(**settings)
        if check is not None:
            bound.apply_defaults()
            check(**bound.arguments)
        return Choice(function, **settings)

    return wrapped
