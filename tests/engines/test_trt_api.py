"""What the engine code uses of TensorRT exists in the real bindings of TensorRT 10 and 11 and of TensorRT-RTX.

`make setup` unpacks the bindings of TensorRT, which is no dependency, into the environment's folder `trt-bindings`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chipdeploy.engines.trt import ALL, RTX_ONLY, TRT_API, TRT_ONLY

HERE = Path(__file__).parent
ENGINES = HERE.parents[1] / "chipdeploy" / "engines"
BINDINGS = Path(sys.prefix) / "trt-bindings"
# Each binding, and the package of ours that runs with it.
WANTED = {str(BINDINGS / "10"): "trt", str(BINDINGS / "11"): "trt", "tensorrt_rtx": "rtx"}
# Attributes of our own, of torch or of Python whose names TensorRT happens to use as well.
OURS = {"append", "bfloat16", "enqueue", "float16", "float32", "logger", "numpy", "pop", "precision", "read", "start"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=WANTED, ids=["tensorrt-10", "tensorrt-11", "tensorrt-rtx"])
def binding(request):
    """The package that runs with it, and the names of one binding."""
    if request.param != "tensorrt_rtx" and script("trt_stubs").compiler() is None:
        pytest.skip("no C compiler is here: the stand-ins for TensorRT's libraries cannot be made")
    return WANTED[request.param], surface(request.param)


def surface(wanted):
    assert "trt-bindings" not in wanted or Path(wanted).is_dir(), f"{wanted} is not there; run: make setup"
    command = [sys.executable, str(HERE / "trt_stubs.py"), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    if "trt-bindings" in wanted:
        assert facts["version"].startswith(f"{Path(wanted).name}.")
    return facts["names"]


class Chains(ast.NodeVisitor):
    """All that is taken from TensorRT's module by name: `trt.ILogger.Severity` is ("ILogger", "Severity").

    The module is `trt`, `self._trt` or `tensorrt(…)`; a variable of one function may stand for a part of a chain.
    """

    def __init__(self):
        self.found = set()
        self.aliases = {"trt": ()}

    def resolve(self, node):
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Call):
            return () if isinstance(node.func, ast.Name) and node.func.id == "tensorrt" else None
        if not isinstance(node, ast.Attribute):
            return None
        if node.attr == "_trt":
            return ()
        base = self.resolve(node.value)
        return None if base is None else (*base, node.attr)

    def visit_Attribute(self, node):
        chain = self.resolve(node)
        if chain:
            self.found.add(chain)
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            base = self.resolve(node.args[0])
            # With a default, the name may be absent.
            if base is not None and len(node.args) == 2:
                self.found.add((*base, node.args[1].value))
        self.generic_visit(node)

    def visit_Assign(self, node):
        for target in node.targets:
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]
            for name, value in pairs:
                if isinstance(name, ast.Name) and (chain := self.resolve(value)) is not None:
                    self.aliases[name.id] = chain
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        outer, self.aliases = self.aliases, dict(self.aliases)
        self.generic_visit(node)
        self.aliases = outer


def chains(source):
    visitor = Chains()
    visitor.visit(ast.parse(source))
    return visitor.found


def sources():
    """The files that use TensorRT's module."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in ENGINES.glob("*.py")}
    return {name: text for name, text in texts.items() if chains(text)}


def packages(chain):
    """The packages of ours that need a chain: those of the table, or all."""
    listed = TRT_API.get(chain[0], {})
    if len(chain) > 1:
        return listed.get(chain[1], ALL)
    return {package for needed in listed.values() for package in needed} or ALL


def missing(names, chain):
    """The part of a chain that a binding lacks, None where it has all."""
    for length, name in enumerate(chain):
        holder = ".".join(chain[:length])
        if name not in (names if not holder else names.get(holder, ())):
            return ".".join(chain[: length + 1])
    return None


def test_every_name_that_the_code_takes_from_the_module_exists(binding):
    package, names = binding
    used = set().union(*(chains(text) for text in sources().values()))
    assert {("Builder",), ("Runtime",), ("DataType", "HALF"), ("ILogger", "Severity", "ERROR")} <= used
    assert [lost for chain in sorted(used) if package in packages(chain) and (lost := missing(names, chain))] == []


def test_every_attribute_of_the_table_exists(binding):
    package, names = binding
    listed = [(owner, name) for owner, table in TRT_API.items() for name, needed in table.items() if package in needed]
    assert len(listed) > 30
    assert [lost for chain in listed if (lost := missing(names, chain))] == []


def test_every_attribute_of_an_object_of_tensorrt_is_in_the_table(binding):
    """Types are not known here, names are: one that a class of the binding has too is listed, or is one of OURS."""
    _, names = binding
    by_chain = {name for text in sources().values() for chain in chains(text) for name in chain}
    listed = {name for table in TRT_API.values() for name in table}
    classes = {name for name in names if name[0].isupper()}
    theirs = {name for owner in classes for name in names[owner] if not name.startswith("_")}
    assert (attributes() & theirs) - by_chain - listed - OURS == set()


def attributes():
    """Every attribute that the files read, set or define."""
    nodes = [node for text in sources().values() for node in ast.walk(ast.parse(text))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return read | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_the_table_lists_nothing_that_is_not_used():
    assert {"trt.py", "build.py"} <= set(sources())
    listed = {name for table in TRT_API.values() for name in table}
    assert listed - attributes() == set()
    assert {needed for table in TRT_API.values() for needed in table.values()} == {ALL, TRT_ONLY, RTX_ONLY}


def test_the_bindings_are_of_different_versions(binding):
    """What 11 dropped and what only RTX has: a check against three copies of one binding would say nothing."""
    package, names = binding
    facts = "FP16" in names["BuilderFlag"], "device_memory_size" in names["ICudaEngine"], "EngineValidity" in names
    old = "IInt8Calibrator" in names
    assert facts == (old, old, package == "rtx")
    assert missing(names, ("BuilderFlag", "NO_SUCH_FLAG")) == "BuilderFlag.NO_SUCH_FLAG"
    assert missing(names, ("NoSuchClass", "name")) == "NoSuchClass"


def test_chains_are_found_through_variables():
    source = """
def build(self, other):
    trt, options = self._trt, self._options
    types = self._trt.DataType
    use(types.HALF, options.HALF, getattr(trt.Flag, "OLD", None), getattr(trt.Flag, "NEW"), tensorrt("rtx").Capability)
    class Log(trt.ILogger): ...
def later(types):
    use(types.INT8)
"""
    expected = {("DataType",), ("DataType", "HALF"), ("Flag",), ("Flag", "NEW"), ("Capability",), ("ILogger",)}
    assert chains(source) == expected


@pytest.mark.parametrize("major", ["10", "11"])
def test_our_logger_and_builder_answer_in_one_line(major):
    """Our subclass of ILogger in the real binding; the library behind it gives nothing, as it does without a driver."""
    if script("trt_stubs").compiler() is None:
        pytest.skip("no C compiler is here: the stand-ins for TensorRT's libraries cannot be made")
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import trt_stubs
sys.modules["tensorrt"] = trt = trt_stubs.load(Path({str(BINDINGS / major)!r}))
from chipdeploy.engines.trt import logger
log = logger("trt")
log.log(trt.ILogger.Severity.WARNING, "unheard")
log.log(trt.ILogger.Severity.ERROR, "no driver\\n found ")
try:
    trt.Builder(log)
except TypeError as error:
    print(log.take(), "|", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no driver found | pybind11::init(): factory function returned nullptr\n"
