"""The reference: a page for each module, made from signatures and docstrings.

The modules are read, not imported. So the site can be built where PyTorch is not installed, and no module can fail on the way.
"""
import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "sft_course"


@functools.cache
def module_of(name: str) -> "Module":
    return Module(name)


class Module:
    "The parsed source of one module."

    def __init__(self, name: str):
        self.name = name
        self.source = PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(self.source).readline)
                         if t.type == tokenize.COMMENT}
        self.own_lines = {i for i, line in enumerate(self.source.splitlines(), 1) if line.lstrip().startswith("#")}
        self.qualify()
        self.nodes = {}
        for node in self.tree.body:
            for key in names_of(node):
                self.nodes.setdefault(key, node)

    def qualify(self) -> None:
        "Gives the package's names in annotations their modules: a name may stand in two of them."
        places = {alias.asname or alias.name: f"{origin_of(n, self.name)}.{alias.name}"
                  for n in ast.walk(self.tree) if isinstance(n, ast.ImportFrom) and origin_of(n, self.name) for alias in n.names}
        places |= {n.name: f"sft_course.{self.name}.{n.name}" for n in self.tree.body if isinstance(n, ast.ClassDef)}
        for node in ast.walk(self.tree):
            for annotation in filter(None, (getattr(node, field, None) for field in ("annotation", "returns"))):
                for name in (n for n in ast.walk(annotation) if isinstance(n, ast.Name) and n.id in places):
                    name.id = places[name.id]

    @property
    def public(self) -> list[str]:
        "The names in `__all__`, in the order of the module."
        listed = next((ast.literal_eval(n.value) for n in self.tree.body
                       if isinstance(n, ast.Assign) and names_of(n) == ["__all__"]), [])
        return sorted((n for n in listed if n in self.nodes), key=lambda n: self.nodes[n].lineno)


def names_of(node: ast.AST) -> list[str]:
    "What a statement at the top of a module defines; a patched method is `Class.method`."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        owner = patched(node)
        return [f"{owner}.{node.name}" if owner else node.name]
    if isinstance(node, ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def origin_of(node: ast.ImportFrom, module: str) -> str:
    "The module of the package from which is imported, or nothing."
    if not node.level:
        return node.module if (node.module or "").startswith("sft_course") else ""
    here = ["sft_course", *module.split(".")]
    return ".".join([*here[:len(here) - node.level], *filter(None, [node.module])])


def decorators(node: ast.AST) -> list[str]:
    return [ast.unparse(d) for d in node.decorator_list]


def patched(node: ast.FunctionDef) -> str:
    "The class to which fastcore's `@patch` adds this function."
    if not any(d.startswith("patch") for d in decorators(node)) or not node.args.args or not node.args.args[0].annotation:
        return ""
    return ast.unparse(node.args.args[0].annotation).strip("'\"").rpartition(".")[2]


# Signatures

def plain(annotation: ast.AST | None) -> str:
    "An annotation as a reader needs it: `Annotated[T, …]` is T."
    if annotation is None:
        return ""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Annotated"):
        annotation = annotation.slice.elts[0]
    return ast.unparse(annotation)


def argument(arg: ast.arg, default: ast.AST | None, star: str = "") -> str:
    text = star + arg.arg
    kind = plain(arg.annotation)
    if kind:
        text += f": {kind}"
    if default is not None:
        text += (" = " if kind else "=") + ast.unparse(default)
    return text


def signature(function: ast.FunctionDef, skip_self: bool = False) -> str:
    "`(x: Tensor, size: int = 96) -> Tensor`, on one line."
    a = function.args
    places = a.posonlyargs + a.args
    defaults = [None] * (len(places) - len(a.defaults)) + a.defaults
    parts = [argument(arg, default) for arg, default in zip(places, defaults)]
    if a.posonlyargs:
        parts.insert(len(a.posonlyargs), "/")
    parts = parts[1:] if skip_self else parts
    if a.vararg:
        parts.append(argument(a.vararg, None, "*"))
    elif a.kwonlyargs:
        parts.append("*")
    parts += [argument(arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        parts.append(argument(a.kwarg, None, "**"))
    back = f" -> {plain(function.returns)}" if function.returns else ""
    return one_line(f"({', '.join(parts)}){back}")


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]


def class_signature(node: ast.ClassDef) -> str:
    made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if made:
        return signature(made, skip_self=True)
    if any(d.startswith(("dataclass", "dataclasses.")) for d in decorators(node)) or "NamedTuple" in map(ast.unparse, node.bases):
        parts = [f"{n.target.id}: {plain(n.annotation)}" + (f" = {ast.unparse(n.value)}" if n.value else "") for n in fields(node)]
        return one_line(f"({', '.join(parts)})")
    return ""


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


# Pages

def escape(text: str) -> str:
    "A docstring as Markdown: signs that mean something there stay signs; code stays code."
    pieces = re.split(r"(``?[^`]+``?)", text)
    pieces[::2] = [re.sub(r"([<$*\[\]|])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def words(node: ast.AST) -> str:
    return escape(ast.get_docstring(node) or "")


def described(module: Module, arguments: list) -> str:
    "A line for each argument or field that has a comment beside it."
    lines = []
    for a in arguments:
        comment = module.comments.get(a.end_lineno)
        if comment and a.end_lineno not in module.own_lines:
            name = a.arg if isinstance(a, ast.arg) else a.target.id
            lines.append(f":param {name}: {escape(comment)}")
    return "\n".join(lines)


def arguments_of(function: ast.FunctionDef) -> list[ast.arg]:
    a = function.args
    listed = a.posonlyargs + a.args + a.kwonlyargs
    ends = [x.end_lineno for x in listed]
    return [x for x in listed if ends.count(x.end_lineno) == 1] if len(listed) > 1 and function.lineno != function.body[0].lineno else []


def directive(kind: str, what: str, body: str, depth: int = 4, options: str = "") -> str:
    fence = ":" * depth
    return f"{fence}{{py:{kind}}} {what}\n{options}\n{body}\n{fence}\n"


def function_entry(module: Module, name: str, node: ast.FunctionDef) -> str:
    body = f"{words(node)}\n\n{described(module, arguments_of(node))}"
    return directive("function", name + signature(node), body)


def method_entry(module: Module, owner: str, node: ast.FunctionDef) -> str:
    marks = decorators(node)
    if any(d.endswith("property") or d == "patch(as_prop=True)" for d in marks):
        options = f":type: {one_line(plain(node.returns))}\n" if node.returns else ""
        return directive("property", f"{owner}.{node.name}", words(node), options=options)
    options = "".join(f":{k}:\n" for k in ("classmethod", "staticmethod") if k in marks)
    skip = "staticmethod" not in marks
    return directive("method", f"{owner}.{node.name}{signature(node, skip)}", words(node), options=options)


def class_entry(module: Module, name: str, node: ast.ClassDef) -> str:
    inside = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and ast.get_docstring(n)]
    inside += [n for key, n in module.nodes.items() if key.startswith(f"{name}.") and not n.name.startswith("_")]
    methods = "\n".join(method_entry(module, name, n) for n in inside)
    body = f"{words(node)}\n\n{described(module, fields(node))}\n\n{methods}"
    return directive("class", name + class_signature(node), body, depth=6)


def value_entry(name: str, node: ast.AST) -> str:
    value = one_line(ast.unparse(node.value)) if node.value else ""
    shown = f"\n:value: {value}\n" if value and len(value) <= 60 else "\n"
    return directive("data", name, "", options=shown.lstrip("\n"))


def entry(module: Module, name: str) -> str:
    node = module.nodes[name]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return function_entry(module, name, node)
    if isinstance(node, ast.ClassDef):
        return class_entry(module, name, node)
    if "Annotated[" in ast.unparse(node):  # options of the command line, which `sft-course --help` explains
        return ""
    return value_entry(name, node)


def patches_elsewhere(module: Module) -> str:
    "Methods that a module adds to a class of another module."
    added = [(key, node) for key, node in module.nodes.items() if "." in key and key.split(".")[0] not in module.nodes]
    return "\n".join(method_entry(module, key.split(".")[0], node) for key, node in added if not node.name.startswith("_"))


def module_page(notebook) -> str:
    module = module_of(notebook.module)
    entries = [entry(module, name) for name in module.public]
    head = [f"# `sft_course.{notebook.module}`", notebook.subtitle, f"Explained in [{notebook.name}](../{notebook.page}.ipynb).",
            f"```{{py:module}} sft_course.{notebook.module}\n```"]
    return "\n\n".join([*head, *filter(None, entries), patches_elsewhere(module)])


def overview(chapters: list, tools: list) -> str:
    def listed(notebooks):
        lines = []
        for n in notebooks:
            names = ", ".join(f"{{py:obj}}`~sft_course.{n.module}.{name}`" for name in shown(n.module))
            lines.append(f"[`{n.module}`]({n.module}.md)\n: {names or n.subtitle}\n")
        return "\n".join(lines)

    about = ("What each module exports, in the order of the chapters. Every name links to its signature and its docstring; every module is "
             "explained in the notebook of which it is made.")
    tree = "\n".join(["```{toctree}", ":hidden:", "", *(f"{n.module} <{n.module}>" for n in chapters + tools), "```"])
    return "\n\n".join(["# The library, name by name", about, "## Chapters", listed(chapters), "## Tools", listed(tools), tree])


def shown(name: str) -> list[str]:
    module = module_of(name)
    return [n for n in module.public if entry(module, n)]


def pages(chapters: list, tools: list) -> Iterator[tuple[str, str]]:
    "Name and text of each page."
    with_module = [[n for n in listed if n.module] for listed in (chapters, tools)]
    yield "index", overview(*with_module)
    for notebook in sum(with_module, []):
        yield notebook.module, module_page(notebook)
