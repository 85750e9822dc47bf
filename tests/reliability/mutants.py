"""How many small mistakes in the numerical core do its tests notice? `mutants.py [--sample 40] [FILE ...]`.

A mutant is a source file with one operator, comparison, constant or condition changed. Each is put in the place of its
module inside a fresh copy of the package and the tests of that file alone are run, up to the first failure; a mutant that
no test notices has survived. Mutants are drawn by a fixed seed where there are more than `--sample`. Known tools
(mutmut, cosmic-ray) find a module by its folder, and here the folder is not the package, so the mutation is done here.
The score is killed / all; a timeout counts as killed. Survivors are printed with their line: some cannot be noticed,
because the changed program computes the same.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "core/bit_packing.py": ["tests/core/test_bit_packing.py"],
    "quantize/kmeans.py": ["tests/quantize/test_kmeans.py"],
    "core/divergence.py": ["tests/core/test_divergence.py", "tests/distill/test_losses.py"],
    "distill/losses.py": ["tests/distill/test_losses.py"],
    "distill/row_losses.py": ["tests/distill/test_losses.py"],
    "distill/loss_mix.py": ["tests/distill/test_losses.py", "tests/distill/test_fused_loss.py"],
    "distill/fused_loss.py": ["tests/distill/test_fused_loss.py"],
    "prune/soft_top_k.py": ["tests/prune/test_soft_top_k.py"],
    "export/parity.py": ["tests/export/test_parity.py"],
}
PACKAGES = {"core": "dwindle"}
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, what was changed, the mutated source) for every mutant of a file."""
    tree = ast.parse(source)
    count = sum(1 for _ in _places(tree))
    for index in range(count):
        changed = copy.deepcopy(tree)
        node, what = next(place for number, place in enumerate(_places(changed)) if number == index)
        line, told = _apply(node, what)
        yield line, told, ast.unparse(ast.fix_missing_locations(changed))


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.AnnAssign):
            skipped |= {id(inner) for inner in ast.walk(node)} if not isinstance(node, ast.AnnAssign) else {
                id(inner) for inner in ast.walk(node.annotation)}  # fmt: skip
        if isinstance(node, ast.FunctionDef):
            for annotation in (node.returns, *(a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg))):
                skipped |= {id(inner) for inner in ast.walk(annotation)} if annotation is not None else set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _SWAPS:
            yield node, "operator"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            yield node, "comparison"
        elif isinstance(node, ast.BoolOp):
            yield node, "condition"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield node, "sign"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, "constant"
        elif isinstance(node, ast.If | ast.IfExp):
            yield node, "if"


def _apply(node: ast.AST, what: str) -> tuple[int, str]:
    line = getattr(node, "lineno", 0)
    before = ast.unparse(node)
    if what == "operator" and isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif what == "comparison" and isinstance(node, ast.Compare):
        node.ops[0] = _SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
    elif what == "condition" and isinstance(node, ast.BoolOp):
        node.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif what == "sign" and isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif what == "constant" and isinstance(node, ast.Constant):
        node.value = node.value + 1  # type: ignore[operator]
    elif what == "if" and isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    return line, f"{what}: {before.splitlines()[0][:60]} -> {ast.unparse(node).splitlines()[0][:60]}"


def _package(folder: Path) -> None:
    """Write the package as it is installed into `folder`."""
    rooms = ("data", "prune", "distill", "adapters", "quantize", "export", "devices", "pipeline", "starter")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "core", folder / "dwindle", ignore=skip)
    for room in rooms:
        shutil.copytree(ROOT / room, folder / "dwindle" / room, ignore=skip)


def _noticed(package: Path, tests: list[str], seconds: float) -> bool:
    """Run the tests in a forked process, which has torch already and imports dwindle from `package`."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(int(seconds))  # unhandled, it ends the process: a mutant that hangs is noticed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 70
        try:
            import pytest

            sys.path.insert(0, str(package))
            os.chdir(ROOT)
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def main() -> int:
    """Print the score of each file; exit code 1 below 80 per cent over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, default=60, help="mutants of each file")
    parser.add_argument("--seconds", type=float, default=300, help="when a run of the tests counts as hanging")
    given = parser.parse_args()
    for name in ("torch", "transformers", "numpy"):  # imported once, for all children
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    killed = made = 0
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch)
        _package(package)
        for name in given.files:
            source = (ROOT / name).read_text(encoding="utf-8")
            room, file = name.split("/")
            place = package / "dwindle" / (file if room in PACKAGES else f"{room}/{file}")
            if _noticed(package, TESTS[name], given.seconds):
                print(f"{name}: its tests fail without any change")
                return 1
            every = list(mutants(source))
            drawn = random.Random(0).sample(every, min(given.sample, len(every)))
            own = 0
            for line, told, text in drawn:
                place.write_text(text, encoding="utf-8")
                if _noticed(package, TESTS[name], given.seconds):
                    own += 1
                else:
                    print(f"  survived: {name}:{line} {told}", flush=True)
            place.write_text(source, encoding="utf-8")
            print(f"{name}: {own} of {len(drawn)} mutants noticed (of {len(every)} in all)", flush=True)
            killed, made = killed + own, made + len(drawn)
    print(f"mutation score {100 * killed / made:.0f} % ({killed} of {made})")
    return 0 if killed >= 0.8 * made else 1


if __name__ == "__main__":
    sys.exit(main())
