"""The one kind of dataclass that the project's trees and states are made of."""

from typing import TypeVar, dataclass_transform

import chex

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """A frozen `chex.dataclass` that type checkers know as one, and that is no mapping."""
    return chex.dataclass(cls, frozen=True, mappable_dataclass=False)
