"""Every name of TensorRT that export/ uses is one the real bindings have: class, method, property, member, keyword."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VERSIONS = ("10.9", "10.16", "11.4")
SOURCES = {name: (HERE.parents[1] / "export" / name).read_text() for name in ("tensorrt.py", "tensorrt_engine.py")}
COMMON = {"name", "shape", "dtype", "errors"}  # attributes that other objects have as well
Table = dict[str, Any]


def signatures(version: str) -> Table:
    """What extract_tensorrt_signatures.py found in the wheel of a version."""
    return dict(json.loads((HERE / f"tensorrt-{version}.json").read_text()))


def own_members() -> dict[str, set[str]]:
    """What our subclasses of TensorRT's classes add to them: class -> attributes and methods."""
    found: dict[str, set[str]] = {}
    for node in (n for source in SOURCES.values() for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)):
        for base in (b.attr for b in node.bases if isinstance(b, ast.Attribute)):
            stored = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
            found[base] = stored | {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


class Uses(ast.NodeVisitor):
    """Walks a source and follows TensorRT's objects through annotations and through what its methods return.

    A kind is a class ("Builder"), the module ("TensorRT"), or "class Builder", "enum DataType", "function f",
    "Builder.create_network" for a bound method. `problems` are lines of text, `seen` the uses that were found.
    """

    def __init__(self, source: str, table: Table) -> None:
        self.table, self.problems, self.seen = table, [], set()  # type: ignore[var-annotated]
        self.classes, self.enums = table["classes"], table["enums"]
        self.names = {n for c in self.classes.values() for n in (*c["methods"], *c["properties"]) if n[0] != "_"}
        self.scopes: list[dict[str, str]] = [{"tensorrt": "TensorRT"}]
        self.own = own_members()
        tree = ast.parse(source)
        for node in (n for text in (*SOURCES.values(), source) for n in ast.walk(ast.parse(text))):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                self.scopes[0][node.name] = f"returns {self.annotated(node.returns)}"
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                self.scopes[0][f"self.{node.target.attr}"] = self.annotated(node.annotation)
        self.visit(tree)

    def annotated(self, node: ast.expr) -> str:
        """The class an annotation names, alone or in a union."""
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
        return next((n for n in names if n in self.classes or n in self.enums or n == "TensorRT"), "")

    def bad(self, node: ast.AST, text: str) -> str:
        self.problems.append(f"line {getattr(node, 'lineno', 0)}: TensorRT {self.table['version']} {text}")
        return ""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A scope: arguments by their annotations."""
        scope = {a.arg: self.annotated(a.annotation) for a in node.args.args if a.annotation}
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A subclass of TensorRT's: the methods it overrides take what they are given."""
        base = self.kind(node.bases[0]) if node.bases else ""
        methods = self.classes.get(base.removeprefix("class "), {"methods": {}})["methods"]
        for method in (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in methods):
            expected = [p["name"] for p in methods[method.name][0]["parameters"]]
            if [a.arg for a in method.args.args[1:]] != expected and method.name != "__init__":
                self.bad(method, f"calls {method.name} with {expected}")
            self.seen.add(f"{base.removeprefix('class ')}.{method.name}")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """The annotation is what is returned."""
        declared, found = self.annotated(node.annotation), self.kind(node.value) if node.value else ""
        if declared and found and declared != found:
            self.bad(node, f"returns {found} where {declared} is declared")
        if isinstance(node.target, ast.Name):
            self.scopes[-1][node.target.id] = declared
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Names take the kind of what they are given; properties have to be settable."""
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.scopes[-1][target.id] = self.kind(node.value)
            elif isinstance(target, ast.Attribute) and (base := self.kind(target.value)) in self.classes:
                found = self.classes[base]["properties"].get(target.attr)
                if found is not None and not found["set"]:
                    self.bad(node, f"lets nobody set {base}.{target.attr}")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Every attribute, whoever's it is."""
        known = self.kind(node, report=True)
        if not known and not self.kind(node.value) and node.attr in self.names - COMMON:
            self.bad(node, f"has {node.attr}, but on an object whose class is not declared")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Every call: some overload takes these arguments."""
        self.kind(node, report=True)
        self.generic_visit(node)

    def kind(self, node: ast.expr | None, report: bool = False) -> str:
        """The kind of an expression, empty if it is none of TensorRT's."""
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self.scopes) if node.id in s), "")
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.scopes[0].get(f"self.{node.attr}", "")
            return self.attribute(node, self.kind(node.value), report)
        if isinstance(node, ast.Call):
            return self.called(node, self.kind(node.func), report)
        return ""

    def attribute(self, node: ast.Attribute, base: str, report: bool) -> str:
        """What `base.attr` is; a problem if there is none."""
        of, name = base.removeprefix("class ").removeprefix("enum "), node.attr
        if base == "TensorRT":
            sorts = (("class", self.classes), ("enum", self.enums), ("function", self.table["functions"]))
            found = next((f"{sort} {name}" for sort, table in sorts if name in table), "")
            found = found or ("str" if name == "__version__" else "")
        elif base.startswith("enum "):
            found = of if name in self.enums[of] else ""
        elif base.startswith("class "):
            found = f"enum {of}.{name}" if f"{of}.{name}" in self.enums else ""
        elif base in self.classes:
            one = self.classes[base]
            found = f"{base}.{name}" if name in one["methods"] else one["properties"].get(name, {}).get("type", "")
            found = found or ("our own" if name in self.own.get(base, ()) else "")
        else:
            return ""
        if report:
            self.seen.add(f"{of}.{name}")
            if not found:
                self.bad(node, f"has no {of}.{name}")
        return found

    def called(self, node: ast.Call, kind: str, report: bool) -> str:
        """What a call returns; a problem if no overload takes its arguments."""
        if kind.startswith("returns "):
            return kind.removeprefix("returns ")
        holder, _, method = kind.partition(".")
        if kind.startswith("class "):
            overloads, returned = self.classes[kind[6:]]["methods"]["__init__"], kind[6:]
        elif kind.startswith("function "):
            overloads, returned = self.table["functions"][kind[9:]], ""
        elif holder in self.classes and method:
            overloads = self.classes[holder]["methods"][method]
            returned = overloads[0]["returns"]
        else:
            return ""
        if report and not any(self.taken(node, overload["parameters"]) for overload in overloads):
            self.bad(node, f"has no {kind} that takes {ast.unparse(node)}")
        return "" if "::" in returned else str(returned)  # 10.9 names a class that is registered later in C++

    def taken(self, node: ast.Call, parameters: list[Table]) -> bool:
        """Whether arguments by place and by keyword fill the required parameters, each once."""
        names, given = [p["name"] for p in parameters], [k.arg for k in node.keywords]
        if any(isinstance(a, ast.Starred) for a in node.args) or len(node.args) > len(names) or None in given:
            return False
        filled = [*names[: len(node.args)], *given]
        required = {p["name"] for p in parameters if p["required"]}
        return len(set(filled)) == len(filled) and required <= set(filled) <= set(names)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_use_is_in_the_bindings(name: str, version: str) -> None:
    """No problem in the sources as they are."""
    assert Uses(SOURCES[name], signatures(version)).problems == []


def test_the_walk_finds_the_uses() -> None:
    """What the backend lives on is among what was checked: a receiver that goes unseen would prove nothing."""
    seen = set().union(*(Uses(source, signatures("11.4")).seen for source in SOURCES.values()))
    assert {
        "TensorRT.Builder",
        "Builder.create_network",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse_from_file",
        "ParserError.node_operator",
        "IBuilderConfig.builder_optimization_level",
        "IBuilderConfig.set_timing_cache",
        "IOptimizationProfile.set_shape",
        "Builder.build_serialized_network",
        "IProgressMonitor.step_complete",
        "ILogger.log",
        "ITimingCache.serialize",
        "Runtime.deserialize_cuda_engine",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "ICudaEngine.device_memory_size_v2",
        "ICudaEngine.get_tensor_mode",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.execute_async_v3",
        "DataType.BF16",
    } <= seen


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("execute_async_v3", "execute_async_v4"),
        ("trt.OnnxParser(", "trt.OnnxReader("),
        ("ignore_mismatch=False", "ignore=False"),
        (", ignore_mismatch=False", ""),
        ("MemoryPoolType.WORKSPACE", "MemoryPoolType.SCRATCH"),
        ("config.builder_optimization_level =", "config.optimization_level ="),
        ("network.num_inputs", "network.inputs"),
        ("min=least, opt=best", "minimum=least, opt=best"),
        ("trt.Runtime(logger_of(trt))", "trt.Runtime()"),
        ("set_device_memory(address, self.arena.size)", "set_device_memory(address)"),
        ("plan: IHostMemory =", "plan: ITimingCache ="),
        ("severity: Any, msg: str", "msg: str"),
        ("get_tensor_name(index)", "get_tensor_name(index, 0)"),
        ("context: IExecutionContext =", "context ="),
        ("BuilderFlag.TF32", "BuilderFlag.FP16"),  # gone in 11
        ("device_memory_size_v2", "device_memory_size"),  # gone in 11
        ("create_execution_context(strategy=strategy)", "create_execution_context_without_device_memory()"),  # as well
    ],
)
def test_a_wrong_name_is_found(right: str, wrong: str) -> None:
    """A slip in the source shows in at least one version."""
    source = next(text for text in SOURCES.values() if right in text).replace(right, wrong)
    assert any(Uses(source, signatures(version)).problems for version in VERSIONS)
