"""Choices that carry their own numbers: called with settings alone, they return a new choice."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Choice(functools.partial):
    """A function with settings; one that has a value for each loss may be a mapping by name."""

    def for_losses(self, names: tuple[str, ...]) -> "Choice":
        """The same, with mappings put into the order of these names of the alignment losses."""
        found = {
            # Weights are of all losses, other settings of the alignment losses.
            key: in_order(
                f"{self.func.__name__}'s {key}", value, ("prediction",) * (key == "weights") + names
            )
            for key, value in self.keywords.items()
        }
        return Choice(self.func, *self.args, **found)


def in_order(what: str, numbers: Any, names: tuple[str, ...]) -> Any:
    """The values of a mapping, in the order of the names; anything else as it is.

    Raises:
      ValueError: a name is unknown or missing.
    """
    if not isinstance(numbers, Mapping):
        return numbers
    if {*names} != {*numbers}:
        named = {*names} - {"prediction"}
        known = ", ".join(names) if named else "numbers in order, since the losses have no names"
        raise ValueError(f"{what} names {', '.join(map(str, numbers))}; expected {known}")
    return tuple(numbers[name] for name in names)


def refuse_names(what: str, value: Any) -> None:
    """Raise a ``TypeError`` if ``value`` is still a mapping by name."""
    if isinstance(value, Mapping):
        raise TypeError(
            f"{what} by name needs an optimizer of pairs or a fork, which know the losses' names"
        )


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
      check: raises an error if the settings are not valid; it is given all of them, whether the
        choice is made or called with arrays.
    """
    signature = inspect.signature(function)
    named = {name for name, each in signature.parameters.items() if each.kind != each.KEYWORD_ONLY}

    @functools.wraps(function)
    def wrapped(*arrays: Any, **settings: Any) -> Any:
        if len(arrays) == 1 and isinstance(arrays[0], int | float | Sequence | Mapping):
            raise TypeError(
                f"{function.__name__} takes its settings by name, "
                f"{', '.join(f'{name}=' for name in signature.parameters if name not in named)}; "
                f"got {arrays[0]!r}"
            )
        bound = signature.bind_partial(*arrays, **settings)
        if check is not None:
            bound.apply_defaults()
            check(**{name: bound.arguments[name] for name in bound.arguments if name not in named})
        if arrays or named & {*settings}:
            return function(*arrays, **settings)
        return Choice(wrapped, **settings)

    return wrapped
