"""Classes that a configuration names, made with the settings that their constructors name.

A name is one of ours, or an import path: `package.module:Class`, or `path/to/file.py:Class` for a file that is in no
package. Its settings are matched by the constructor's keyword arguments: a setting of the configuration that it doesn't
name is refused where it was changed, an option that it doesn't have always.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from metatrain import storage
from metatrain.errors import ConfigError
from metatrain.learners import remedy_for


class Setting(NamedTuple):
    """A value that a constructor may take by its name."""

    name: str  # of the keyword argument
    value: Any
    #: Where it stands in the configuration, and whether it was changed: then it may not be ignored.
    where: str = ""
    changed: bool = False


def named(name: str, known: Mapping[str, str], base: type, where: str) -> type[Any]:
    """The class of that name.

    Args:
        name: One of `known`, or an import path.
        known: Name → import path.
        base: What the class must be derived from.
        where: The field of the configuration that holds the name.

    Raises:
        ConfigError: There is no such name, module, file or class, or the class is of another kind.
    """
    if remedy := remedy_for(name, known):
        raise ConfigError("There is none of this name.", where=where, got=name, remedy=remedy)
    module_name, _, class_name = known.get(name, name).rpartition(":")
    found = getattr(_module(module_name, where), class_name, None)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(
            f"This is no class derived from {base.__module__}.{base.__name__}.",
            where=where,
            got=name,
            remedy="Check the name behind the colon, and what the class is derived from.",
        )
    return found


def absolute_name(name: str) -> str:
    """The same name with the absolute path of its file, where it names one: a Ray worker has another working folder."""
    file, class_name = _file_of(name)
    return f"{storage.absolute(file)}:{class_name}" if file else name


def placeless_name(name: str) -> str:
    """The same name without the folder of its file, where it names one: what it is, wherever it lies."""
    file, class_name = _file_of(name)
    return f"{Path(file).name}:{class_name}" if file else name


def _file_of(name: str) -> tuple[str, str]:
    """The file and the class that a name means; no file where it is one of ours or of a module."""
    file, _, class_name = name.rpartition(":")
    return (file, class_name) if file.endswith(".py") else ("", name)


def made(
    kind: type[Any], first: Iterable[Any], settings: Iterable[Setting], options: Mapping[str, Any], where: str
) -> Any:
    """An instance of `kind`: `first` by position, then of `settings` those that it names, then `options`.

    Args:
        where: The section of the configuration that speaks of it (`meta`): options are under `WHERE.options`.

    Raises:
        ConfigError: An option that the class doesn't have or can't take, a changed setting that it doesn't have, or
            what the constructor itself refuses as a ValueError.
    """
    first = tuple(first)
    arguments = list(inspect.signature(kind).parameters.values())[len(first) :]
    names = [a.name for a in arguments if a.kind in (a.KEYWORD_ONLY, a.POSITIONAL_OR_KEYWORD)]
    chosen: dict[str, Any] = {}
    for setting in settings:
        if setting.name in names:
            chosen[setting.name] = setting.value
        elif setting.changed:
            raise ConfigError(
                f"{kind.__name__} has no such setting, so the value would be without effect.",
                where=setting.where,
                got=setting.value,
                remedy="Leave it at its default, or choose what has it.",
            )
    own = [name for name in names if name not in chosen]
    for name, value in options.items():
        if name not in own:
            near = difflib.get_close_matches(name, own, n=1)
            raise ConfigError(
                f"{kind.__name__} has no such option.",
                where=f"{where}.options.{name}",
                got=value,
                remedy=f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(own) or 'none'}.",
            )
        chosen[name] = _checked(kind, name, value, f"{where}.options.{name}")
    if lacking := [a.name for a in arguments if a.name in own and a.default is a.empty and a.name not in chosen]:
        raise ConfigError(
            f"{kind.__name__} needs options.", where=f"{where}.options", remedy=f"Give {', '.join(lacking)}."
        )
    try:
        return kind(*first, **chosen)
    except ValueError as error:
        raise ConfigError(
            f"{kind.__name__} can't be made so: {error}.",
            where=where,
            remedy="Change the settings that it names.",
        ) from error


def _module(name: str, where: str) -> Any:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        file = Path(name)
        if not file.is_file():
            raise ImportError(f"no such file: {file.resolve()}")
        # Under one name for one file, so that it is loaded once, and can be pickled by those who loaded it.
        module_name = f"metatrain_file_{file.stem}"
        if (loaded := sys.modules.get(module_name)) and getattr(loaded, "__file__", None) == str(file.resolve()):
            return loaded
        spec = importlib.util.spec_from_file_location(module_name, file.resolve())
        if spec is None or spec.loader is None:
            raise ImportError(f"no Python file: {file.resolve()}")
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        return module
    except Exception as error:  # whatever a module of the user's raises as it is imported
        raise ConfigError(
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            where=where,
            got=name,
            remedy="Check the path (a trained run's is in its config.yaml); a module must be found from PYTHONPATH on "
            "every machine, a file be there on it.",
        ) from error


def _checked(kind: type[Any], name: str, value: Any, where: str) -> Any:
    """The value as the argument's annotation wants it."""
    try:
        hint = typing.get_type_hints(kind.__init__).get(name, Any)
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ConfigError(
            f"{kind.__name__} can't take this: {error.errors()[0]['msg']}.", where=where, got=value, remedy="Change it."
        ) from error
    except (NameError, TypeError):  # no annotation, or one that can't be read: as it is
        return value
