"""Name -> object, filled by scanning a folder: adding a file is registering it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vitq.core.errors import InputError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: what is registered, for messages ("recipe").
        package: dotted name of the folder whose modules register things when they are imported. It is
            imported on the first look-up, so `import vitq` stays light.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._items: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers what it decorates under `name`.

        Raises:
            InputError: another object already has that name.
        """

        def add(item: T) -> T:
            old = self._items.get(name)
            if old is not None and _origin(old) != _origin(item):
                raise InputError(f"two {self.kind}s are called {name!r}: {old!r} and {item!r}; rename one")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        self._scan()
        if name not in self._items:
            raise UnknownNameError(self.kind, name, self._items)
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        self._scan()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._scan()
        return iter(sorted(self._items))

    def remove(self, name: str) -> None:
        """Forget a name (tests register throw-away recipes)."""
        del self._items[name]

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        try:
            folder = importlib.import_module(self.package)
            for module in pkgutil.walk_packages(folder.__path__, prefix=f"{self.package}."):
                importlib.import_module(module.name)
        except BaseException:
            self._scanned = False  # the next look-up must not find half of the folder, in silence
            raise


def _origin(item: object) -> tuple[object, ...]:
    """Where something was defined: the same for a file that is imported again, under whatever module name."""
    code = getattr(item, "__code__", None)
    file = code.co_filename if code is not None else getattr(item, "__module__", None)
    return file, getattr(item, "__qualname__", item)
