"""Fail if a class or function of the package has more lines of code than the limits; print the longest.

Docstrings, comments and blank lines do not count. A class's methods and a function's inner functions count.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "jepa_hf"
LIMITS = {"class": 300, "function": 60}
# Name -> why it may be longer.
ALLOWED = {
    "models/modeling_jepa.py:JepaForRepresentationPrediction.forward": "half of it is the signature and the output",
    "models/configuration_jepa.py:JepaConfig.__init__": "one argument and one assignment per option",
    "llm_jepa/trainer.py:LlmJepaTrainer.__init__": "a third of it is the signature, a third the base's arguments",
}


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines with code."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def definitions(node: ast.AST, prefix: str) -> Iterator[tuple[ast.AST, str]]:
    """Every class and function below a node with its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, prefix + child.name
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def sizes() -> list[tuple[int, str, str]]:
    """Lines of code, kind and name of every class and function, longest first."""
    rows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        lines = code_lines(source, tree)
        for node, name in definitions(tree, f"{path.relative_to(PACKAGE).as_posix()}:"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            rows.append((len(lines & set(range(node.lineno, node.end_lineno + 1))), kind, name))
    return sorted(rows, reverse=True)


def main() -> int:
    rows = sizes()
    for kind in LIMITS:
        longest = [f"{name} {size}" for size, of, name in rows if of == kind][:5]
        print(f"longest {kind}: {', '.join(longest)}")
    long = {name: size for size, kind, name in rows if size > LIMITS[kind]}
    for name, size in long.items():
        print(f"{name} has {size} lines of code" + (f": {ALLOWED[name]}" if name in ALLOWED else ". Split it."))
    unused = ALLOWED.keys() - long.keys()
    if unused:
        print(f"Remove from ALLOWED: {', '.join(sorted(unused))}")
    return 1 if unused or long.keys() - ALLOWED.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
