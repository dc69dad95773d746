"""Classes, methods, keywords and enumerations of TensorRT's Python bindings, read from a `-bindings` wheel.

    python tests/export/extract_tensorrt_signatures.py WHEEL OUT.json [CLASS ...]

The wheel's extension module is real but needs libnvinfer, libnvinfer_plugin and libnvonnxparser, which are in another
wheel. It asks them for a handful of C functions only. So libraries of those names are made here whose functions all
return null (needs `cc`, `nm`, `readelf`, and the Python version the wheel is for); the module then imports, and
pybind11 tells the signature of everything it registers.

What the JSON says: each class's bases, methods with their overloads (keyword, type, whether it may be left out; what is
returned), properties with their type and whether they can be set, enumerations with their members, module functions.
What it cannot say: what a function does, when it returns None, which values it refuses, in which order calls are due,
and whether an object exposes its bytes as a buffer. No function of TensorRT runs here.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CLASSES = (
    "Builder",
    "Dims",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "ParserError",
    "Runtime",
)  # what export/tensorrt.py can come across
PREFIX = re.compile(r"\btensorrt_bindings\.tensorrt\.")


def pieces(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are in no bracket."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == separator and depth == 0:
            found.append(text[start:i])
            start = i + 1
    return [piece.strip() for piece in (*found, text[start:]) if piece.strip()]


def parameter(text: str) -> dict[str, object]:
    """`name: type = default` as name, type, required."""
    name, _, rest = text.partition(":")
    kind, default, _ = rest.partition("=")
    return {"name": name.strip(), "type": kind.strip(), "required": not default}


def overloads(name: str, doc: str | None) -> list[dict[str, object]]:
    """Every signature pybind11 wrote into a docstring, without `self`."""
    found = []
    for line in PREFIX.sub("", doc or "").split("\n"):
        match = re.fullmatch(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.*)", line.strip())
        if match:
            given = [parameter(text) for text in pieces(match[1])]
            found.append({"parameters": [p for p in given if p["name"] != "self"], "returns": match[2].strip()})
    return found


def property_of(value: property) -> dict[str, object]:
    """Its type, as the getter tells it, and whether there is a setter."""
    match = re.search(r"-> (.*)", PREFIX.sub("", value.fget.__doc__ or "") if value.fget else "")
    return {"type": match[1].strip() if match else "", "set": value.fset is not None}


def described(kind: type) -> dict[str, object]:
    """One class: bases, methods and properties, its own and inherited ones."""
    methods, properties = {}, {}
    for name in dir(kind):
        value = getattr(kind, name)
        if isinstance(value, property):
            properties[name] = property_of(value)
        elif callable(value) and (found := overloads(name, value.__doc__)):
            methods[name] = found
    bases = [base.__name__ for base in kind.__mro__[1:] if not base.__name__.startswith(("pybind11", "object"))]
    return {"bases": bases, "methods": methods, "properties": properties}


def dump(wanted: list[str]) -> dict[str, object]:
    """Everything of the importable bindings; `wanted` limits the classes, not the enumerations."""
    import tensorrt_bindings as bindings  # type: ignore[import-not-found]

    enumerations, functions = {}, {}
    for holder, prefix in ((bindings, ""), (bindings.ILogger, "ILogger.")):
        for name, value in sorted(vars(holder).items()):
            if hasattr(value, "__members__") and isinstance(value, type):
                enumerations[prefix + name] = list(value.__members__)
    for name, value in sorted(vars(bindings).items()):
        if not isinstance(value, type) and (found := overloads(name, getattr(value, "__doc__", None))):
            functions[name] = found
    classes = {name: described(getattr(bindings, name)) for name in sorted(wanted)}
    return {"version": bindings.__version__, "classes": classes, "enums": enumerations, "functions": functions}


def empty_libraries(module: Path, folder: Path) -> None:
    """Libraries under the names the extension module asks for, with the functions it misses, all returning null."""
    needed, missing = (
        subprocess.run([*tool, module], capture_output=True, text=True, check=True).stdout
        for tool in (["readelf", "-d"], ["nm", "-D", "--undefined-only"])
    )
    names = [line.split()[-1] for line in missing.split("\n") if re.search(r" U (create|get|init)\w+$", line)]
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    for library in re.findall(r"\[(libnv\S+)\]", needed):
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source], check=True)


def main(wheel: str, out: str, *wanted: str) -> None:
    """Unpack, make the libraries, import in a process that finds them, write the JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(wheel).extractall(folder)
        empty_libraries(next(folder.glob("tensorrt_bindings/tensorrt*.so")), folder)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
        command = [sys.executable, __file__, "--dump", *(wanted or CLASSES)]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    Path(out).write_text(told)


if __name__ == "__main__":
    if sys.argv[1] == "--dump":
        print(json.dumps(dump(sys.argv[2:]), separators=(",", ":"), sort_keys=True))
    else:
        main(*sys.argv[1:])
