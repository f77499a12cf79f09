"""SGLang's source read as text: finds a name and its signature without importing anything.

Wheels of several SGLang versions can so be looked at side by side, also where their dependencies
are not installed. Only what a name stands for is followed (imports inside SGLang, aliases, base
classes); nothing is evaluated.
"""

import ast
import inspect
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

# Bases whose subclasses' fields are the parameters of their constructor.
FIELD_BASES = {"NamedTuple", "Struct"}
# Bases from outside SGLang that bring no `__init__` of their own.
EMPTY_BASES = {"ABC", "Generic", "Protocol", "object"}


class NotFound(LookupError):
    """One sentence: which part of a dotted name an SGLang does not have."""


class SglangSource:
    """The source files of one SGLang.

    `root` is the folder that holds the package `sglang` (a site-packages) or a wheel (`.whl`);
    ValueError if it is neither.
    """

    def __init__(self, root: Path, version: str) -> None:
        self.version = version
        self._root: Path | zipfile.Path = zipfile.Path(root) if root.suffix == ".whl" else root
        if not (self._root / "sglang" / "__init__.py").is_file():
            raise ValueError(f"{root} holds no package `sglang`: a wheel or a site-packages does")
        self._modules: dict[str, Module | None] = {}

    @classmethod
    def installed(cls) -> "SglangSource":
        """The SGLang of this environment; ValueError if there is none."""
        spec = find_spec("sglang")
        if spec is None or spec.origin is None:
            raise ValueError("SGLang is not installed here; name the wheels to check")
        return cls(Path(spec.origin).parents[1], installed_version("sglang"))

    @classmethod
    def wheel(cls, path: Path) -> "SglangSource":
        """The SGLang in a wheel, whose name says its version (NAME-VERSION-TAGS.whl, PEP 427)."""
        if path.suffix != ".whl" or not path.is_file():
            raise ValueError(f"{path} is not a wheel: a file sglang-VERSION-TAGS.whl is")
        return cls(path, path.name.split("-")[1])

    def module(self, name: str) -> "Module | None":
        """The module of that dotted name; None if it is not SGLang's or there is no such file."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> "Module | None":
        if name.split(".")[0] != "sglang":
            return None
        path = name.replace(".", "/")
        for file, is_package in ((f"{path}/__init__.py", True), (f"{path}.py", False)):
            source = self._root / file
            if source.is_file():
                return Module(self, name, is_package, ast.parse(source.read_text("utf-8")))
        if (self._root / path).is_dir():  # a namespace package, as sglang.srt is
            return Module(self, name, True, ast.parse(""))
        return None

    def find(self, dotted: str) -> "Definition":
        """What a dotted name stands for; NotFound names the first part that is missing."""
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:length]))
            if module is not None:
                break
        else:
            raise NotFound(f"{parts[0]} is not a package of SGLang")
        found = Definition(module, module.tree)
        for name in parts[length:]:
            found = found.member(name)
        return found


@dataclass(frozen=True)
class Module:
    """One parsed source file."""

    source: SglangSource
    name: str
    is_package: bool
    tree: ast.Module

    @cached_property
    def names(self) -> dict[str, ast.AST]:
        """What the module's own statements bind, without what `import *` brings."""
        return dict(_bindings(self.tree.body))

    def imported_module(self, node: ast.ImportFrom) -> str:
        """The full name of the module that a `from ... import` reads."""
        if node.level == 0:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + self.is_package]
        return ".".join(parts + ([node.module] if node.module else []))

    def lookup(self, name: str) -> "Definition | None":
        """What a name of this module's namespace stands for, imports followed."""
        node = self.names.get(name)
        if node is not None:
            return self._follow(name, node)
        submodule = self.source.module(f"{self.name}.{name}")
        if submodule is not None:
            return Definition(submodule, submodule.tree)
        if name.startswith("_"):  # `import *` leaves these out
            return None
        for star in self.tree.body:
            if isinstance(star, ast.ImportFrom) and star.names[0].name == "*":
                origin = self.source.module(self.imported_module(star))
                found = origin.lookup(name) if origin else None
                if found is not None:
                    return found
        return None

    def _follow(self, name: str, node: ast.AST) -> "Definition":
        match node:
            case ast.ImportFrom():
                original = next(a.name for a in node.names if (a.asname or a.name) == name)
                origin = self.source.module(self.imported_module(node))
                if origin is None:  # from outside SGLang
                    return Definition(self, node)
                found = origin.lookup(original)
                if found is None:
                    raise NotFound(f"{self.name} imports {original}, which {origin.name} lacks")
                return found
            case ast.Assign(value=ast.Name(id=alias)) if alias != name:
                return self.lookup(alias) or Definition(self, node)
        return Definition(self, node)


@dataclass(frozen=True)
class Definition:
    """The syntax that defines a name, and the module it stands in."""

    module: Module
    node: ast.AST
    is_member: bool = False

    def member(self, name: str) -> "Definition":
        """An attribute of a module or class, inherited ones included; NotFound if there is none."""
        if isinstance(self.node, ast.Module):
            found = self.module.lookup(name)
            where = f"module {self.module.name}"
        elif isinstance(self.node, ast.ClassDef):
            found = next((m for c in self.classes() if (m := c._own_member(name))), None)
            where = f"class {self.module.name}.{self.node.name}"
        else:
            raise NotFound(f"{self.module.name} makes the owner of {name} when it runs")
        if found is None:
            raise NotFound(f"{where} has no {name}")
        return found

    def classes(self) -> Iterator["Definition"]:
        """A class and its bases inside SGLang, depth first."""
        assert isinstance(self.node, ast.ClassDef)
        yield self
        for base in self.node.bases:
            # Generic[T] and the like have their class before the bracket.
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self.module.lookup(base.id) if isinstance(base, ast.Name) else None
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from found.classes()

    def _own_member(self, name: str) -> "Definition | None":
        assert isinstance(self.node, ast.ClassDef)
        node = dict(_bindings(self.node.body)).get(name)
        if node is None and name in _initialised(self.node):
            node = self.node
        return Definition(self.module, node, is_member=True) if node is not None else None

    def signature(self) -> inspect.Signature:
        """The parameters a call on this name has to fit, `self` and `cls` taken off.

        A class has those of its `__init__`, or of its fields if it is a dataclass or the like.
        NotFound if the source does not say.
        """
        match self.node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                static = any(ast.unparse(d) == "staticmethod" for d in self.node.decorator_list)
                return _signature(self.node.args, skip_first=self.is_member and not static)
            case ast.ClassDef(name=name):
                for owner in self.classes():
                    init = owner._own_member("__init__")
                    if init is not None:
                        return init.signature()
                    if owner._has_fields():
                        return self._field_signature()
                    if not owner._bases_are_known():
                        raise NotFound(
                            f"class {self.module.name}.{name} takes its __init__ from "
                            "outside SGLang"
                        )
                return inspect.Signature()
        raise NotFound(f"{self.module.name} makes it when it runs, its parameters are not written")

    def _has_fields(self) -> bool:
        assert isinstance(self.node, ast.ClassDef)
        if any("dataclass" in ast.unparse(node) for node in self.node.decorator_list):
            return True
        return any(ast.unparse(base).split(".")[-1] in FIELD_BASES for base in self.node.bases)

    def _bases_are_known(self) -> bool:
        """Whether no base can bring an `__init__` that is not in SGLang's source."""
        assert isinstance(self.node, ast.ClassDef)
        bases = [ast.unparse(base).split("[")[0] for base in self.node.bases]
        return all(base in EMPTY_BASES or self._is_class(base) for base in bases)

    def _is_class(self, name: str) -> bool:
        found = self.module.lookup(name)
        return found is not None and isinstance(found.node, ast.ClassDef)

    def _field_signature(self) -> inspect.Signature:
        fields: dict[str, inspect.Parameter] = {}
        for owner in reversed(list(self.classes())):
            assert isinstance(owner.node, ast.ClassDef)
            for node in owner.node.body:
                match node:
                    case ast.AnnAssign(target=ast.Name(id=name), value=value):
                        # A keyword, so that a default may stand before a field without one.
                        fields[name] = _parameter(
                            name, inspect.Parameter.KEYWORD_ONLY, value is not None
                        )
        return inspect.Signature(list(fields.values()))


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of everything a block of statements may bind when it runs, in order."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Assign():
                for part in (part for target in node.targets for part in ast.walk(target)):
                    # In `owner.attribute = ...` the owner is read.
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        yield part.id, node
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.ImportFrom() | ast.Import():
                for alias in node.names:
                    yield alias.asname or alias.name.split(".")[0], node
            case ast.If():
                yield from _bindings(node.orelse)
                # What only a type checker imports is not there at run time.
                if not ast.unparse(node.test).endswith("TYPE_CHECKING"):
                    yield from _bindings(node.body)
            case ast.Try():
                for handler in node.handlers:
                    yield from _bindings(handler.body)
                yield from _bindings(node.body + node.orelse + node.finalbody)
            case ast.With():
                yield from _bindings(node.body)


def _initialised(node: ast.ClassDef) -> set[str]:
    """The attributes that a class's `__init__` sets; what other methods set may not be there."""
    init = dict(_bindings(node.body)).get("__init__")
    return {
        part.attr
        for part in (ast.walk(init) if init else ())
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }


class _SomeDefault:
    """Stands for a default value, which is not evaluated."""

    def __repr__(self) -> str:
        return "..."


def _parameter(name: str, kind: inspect._ParameterKind, has_default: bool) -> inspect.Parameter:
    default = _SomeDefault() if has_default else inspect.Parameter.empty
    return inspect.Parameter(name, kind, default=default)


def _signature(args: ast.arguments, skip_first: bool) -> inspect.Signature:
    kinds = inspect.Parameter
    positional = args.posonlyargs + args.args
    first_default = len(positional) - len(args.defaults)
    parameters = []
    for i, arg in enumerate(positional):
        only = i < len(args.posonlyargs)
        kind = kinds.POSITIONAL_ONLY if only else kinds.POSITIONAL_OR_KEYWORD
        parameters.append(_parameter(arg.arg, kind, i >= first_default))
    parameters = parameters[skip_first:]
    if args.vararg:
        parameters.append(_parameter(args.vararg.arg, kinds.VAR_POSITIONAL, False))
    for keyword, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parameters.append(_parameter(keyword.arg, kinds.KEYWORD_ONLY, default is not None))
    if args.kwarg:
        parameters.append(_parameter(args.kwarg.arg, kinds.VAR_KEYWORD, False))
    return inspect.Signature(parameters)
