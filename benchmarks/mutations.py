"""Do the tests pin the rule? Small faults put into the code one at a time: which do tests notice?

  python -m benchmarks.mutations --mutants=200 --output=mutants.jsonl

Draws mutants of the files of `TARGETS`: a term or a call taken away, an operator, a comparison, a
number or a condition changed. Each is tried in a copy of the repository's tracked files, in a
process of its own with a time limit. Prints every survivor as a diff, and how many were killed,
with a 95 % interval.

`--output` keeps what was found: a second call goes on where the first one stopped, and tries the
survivors again, for tests that were sharpened since.
"""

import ast
import copy
import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from scipy.stats import binomtest

ROOT = Path(__file__).parent.parent
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Target:
    """A file, and the tests that are to notice its faults."""

    file: str
    tests: tuple[str, ...]  # as pytest takes them, the fast ones first
    functions: tuple[str, ...] = ()  # that are changed; all, where there is none


def _of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{file}::test_{name}" for name in names)


# Without the simulations of length_test.py: what kills a mutant here is an exact test.
_SIMULATIONS = "not seldom_taken and not beyond_length_is_found and not like_real_ones"
_REPORT = _of(
    "tests/report_test.py",
    "a_difference_is_that_of_all_pairs_of_rows",
    "a_difference_of_few_rows_says_what_there_is",
    "aurocs_that_do_not_vary_have_wilsons_interval",
    "separated_groups_have_an_interval_of_auroc",
    "p_values_are_adjusted_by_holm",
    "the_sentence_has_the_verdict_in_words",
    "the_sentence_has_no_ratio_of_pairs_that_say_nothing",
    "the_sentence_and_the_table_give_the_size",
    "verdicts_of_the_sentence_and_of_other_rows_are_two_families",
    "a_yes_has_to_survive_the_other_verdicts",
    "beyond_loss_is_asked_as_well",
    "few_rows_and_zero_gradients_leave_gaps_empty",
)
_MEASURES = _of(
    "tests/spectra_test.py",
    "closed_forms",
    "a_batch_is_measured_row_by_row",
    "cosines_and_entries_at_any_scale",
    "zero_gradient",
    "equal_to_the_svd_of_the_product",
)
_SINGULAR_VALUES = _of(
    "tests/spectra_test.py",
    "a_batch_has_the_values_of_its_rows",
    "equal_to_the_svd_of_the_product",
    "zero_gradient",
    "repeated_tokens_leave_the_tail_at_zero",
    "the_qr_route_is_within_a_millionth_of_the_largest_value",
)
TARGETS = (
    Target("gradjax/report/length.py", ("tests/length_test.py",)),
    Target("gradjax/report/matching.py", ("tests/matching_test.py", "tests/length_test.py")),
    Target(
        "gradjax/report/compare.py",
        _REPORT,
        ("settled", "holm", "answer", "_said", "difference", "_auroc_interval"),
    ),
    Target("gradjax/report/layers.py", ("tests/layers_test.py",)),
    Target("gradjax/spectra/measures.py", _MEASURES),
    Target("gradjax/spectra/singular_values.py", _SINGULAR_VALUES),
)
_WORDS = {"rule"}  # functions that only write text

_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_PAIRS = (("min", "max"), ("minimum", "maximum"), ("any", "all"), ("var", "std"), ("mean", "sum"))
_NAMES = dict(_PAIRS) | {b: a for a, b in _PAIRS}
# Calls that hold or convert their argument: without them a mutant only crashes, or nothing changes.
_HOLDERS = {
    *("len", "range", "list", "tuple", "zip", "map", "enumerate", "float", "int", "str"),
    *("array", "asarray", "astype", "append", "concat", "concatenate", "column_stack"),
}
_ONE_OF = {"min", "max", "minimum", "maximum", "where"}
_UNREAD = ("annotation", "returns", "decorator_list", "format_spec")  # fields of nodes
_CHECKS = ("strict", "dtype")  # keywords that only guard


def alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.BinOp(left, op, right):
            yield from (left, right)
            if other := _OPERATORS.get(type(op)):
                yield ast.BinOp(left, other(), right)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
            yield from values
        case ast.Compare(left, ops, rights):
            for i, op in enumerate(ops):
                for other in _COMPARISONS.get(type(op), ()):
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], rights)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value - 1 if value else 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value)
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.Name("min" | "max" | "any" | "all" as name, context):
            yield ast.Name(_NAMES[name], context)
        case ast.Attribute(value, name, context) if name in _NAMES:
            yield ast.Attribute(value, _NAMES[name], context)
        case ast.Call(function, arguments, keywords):
            name = ast.unparse(function).rpartition(".")[2]
            if name in _ONE_OF:
                yield from arguments[-2:]
            elif len(arguments) == 1 and name not in _HOLDERS:
                yield arguments[0]
            for keyword in keywords:
                if keyword.arg not in _CHECKS:
                    rest = [other for other in keywords if other is not keyword]
                    yield ast.Call(function, arguments, rest)
        case ast.If(_, body, orelse):
            yield ast.If(ast.Constant(True), body, orelse)
            yield ast.If(ast.Constant(False), body, orelse)
        case ast.AugAssign() | ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.comprehension(target, source, [_, *_], is_async):
            yield ast.comprehension(target, source, [], is_async)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file with one fault."""

    target: Target
    line: int
    text: str
    diff: str

    @property
    def name(self) -> str:
        """What tells it from all others of this code."""
        return f"{self.target.file}\n{self.diff}"


def mutants(target: Target, source: str) -> list[Mutant]:
    """All of a file's, without comments."""
    tree = ast.parse(source)
    plain = ast.unparse(tree)
    found = []
    for line, mutated in _mutated(tree, target.functions):
        text = ast.unparse(ast.fix_missing_locations(mutated))
        lines = difflib.unified_diff(plain.split("\n"), text.split("\n"), n=0, lineterm="")
        diff = "\n".join(line for line in list(lines)[2:] if not line.startswith("@@"))
        if diff:
            found.append(Mutant(target, line, text, diff))
    return list({one.name: one for one in found}.values())


def _mutated(tree: ast.Module, functions: tuple[str, ...]) -> Iterator[tuple[int, ast.Module]]:
    """Trees with one node replaced, each with the line of the node."""

    def visit(node: ast.AST, line: int, wanted: bool) -> Iterator[tuple[int, ast.Module]]:
        line = getattr(node, "lineno", line)
        if isinstance(node, ast.FunctionDef):
            if node.name in _WORDS:
                return
            wanted = wanted or node.name in functions
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for i, child in enumerate(children):
                guards = isinstance(child, ast.keyword) and child.arg in _CHECKS
                if field in _UNREAD or guards or not isinstance(child, ast.AST):
                    continue
                for other in alternatives(child) if wanted else ():
                    _put(node, field, i, other)
                    yield getattr(child, "lineno", line), copy.deepcopy(tree)
                    _put(node, field, i, child)
                yield from visit(child, line, wanted)

    yield from visit(tree, 0, not functions)


def _put(node: ast.AST, field: str, i: int, child: ast.AST) -> None:
    value = getattr(node, field)
    if isinstance(value, list):
        value[i] = child
    else:
        setattr(node, field, child)


def draw(every: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Some at random, file by file. Where code changes, all others are drawn as before."""

    def ticket(one: Mutant) -> bytes:
        return hashlib.sha256(f"{seed} {one.name}".encode()).digest()

    chosen = {one.name for one in sorted(every, key=ticket)[:count]}
    return [one for one in every if one.name in chosen]


def copy_tracked(folder: Path) -> None:
    """The repository's tracked files as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def passes(folder: Path, tests: tuple[str, ...], limit: float | None) -> bool:
    """Whether the tests do, within `limit` seconds."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--hypothesis-seed=0", "-k", _SIMULATIONS, *tests]
    # Bytecode of a mutant could be taken for that of the next one.
    environment = os.environ | ({"PYTHONDONTWRITEBYTECODE": "1"} if limit else {})
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            run.wait(limit)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # with the processes that tests started
                run.wait()
        if limit is None and run.returncode:
            said.seek(0)
            raise SystemExit(f"Without a fault, {' '.join(command)} fails:\n{said.read()}")
    return run.returncode == 0


def try_all(drawn: list[Mutant], known: dict[str, bool], output: Path | None) -> dict[str, bool]:
    """Whether each mutant is killed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_tracked(folder)
        limits: dict[tuple[str, ...], float] = {}
        for number, one in enumerate(drawn):
            if known.get(one.name):
                continue
            tests = one.target.tests
            if tests not in limits:
                start = time.monotonic()
                passes(folder, tests, limit=None)
                limits[tests] = 60 + 5 * (time.monotonic() - start)
            path = folder / one.target.file
            right = path.read_text()
            path.write_text(one.text)
            known[one.name] = not passes(folder, tests, limits[tests])
            path.write_text(right)
            if output:
                with output.open("a") as file:
                    file.write(json.dumps({"mutant": one.name, "killed": known[one.name]}) + "\n")
            said = "killed" if known[one.name] else "survived"
            print(f"{number + 1}/{len(drawn)} {one.target.file}:{one.line} {said}", flush=True)
    return known


def main(_: list[str]) -> None:
    """Draws mutants, tries them, and prints what survived."""
    sources = {target: (ROOT / target.file).read_text() for target in TARGETS}
    every = [one for target, source in sources.items() for one in mutants(target, source)]
    drawn = draw(every, FLAGS.mutants or len(every), FLAGS.seed)
    output = Path(FLAGS.output) if FLAGS.output else None
    known = {}
    if output and output.exists():
        records = [json.loads(line) for line in output.read_text().splitlines()]
        known = {record["mutant"]: record["killed"] for record in records}
    known = try_all(drawn, known, output)
    for one in drawn:
        if not known[one.name]:
            print(f"\n{one.target.file}:{one.line}\n{one.diff}")
    print(f"\n{'':36}killed   all  of")
    for target in TARGETS:
        own = [known[one.name] for one in drawn if one.target == target]
        of = sum(one.target == target for one in every)
        print(f"{target.file:36}{sum(own):6}{len(own):6}{of:6}")
    killed = sum(known[one.name] for one in drawn)
    low, high = binomtest(killed, len(drawn)).proportion_ci(method="wilson")
    print(f"{'all':36}{killed:6}{len(drawn):6}{len(every):6}")
    print(f"{killed / len(drawn):.1%} killed, 95 % interval {low:.1%} to {high:.1%}")


if __name__ == "__main__":
    flags.DEFINE_integer("mutants", 200, "drawn at random; 0: all")
    flags.DEFINE_integer("seed", 0, "of the draw")
    flags.DEFINE_string("output", None, "JSON lines that keep what was found")
    app.run(main)
