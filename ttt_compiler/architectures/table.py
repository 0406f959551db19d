"""``docs/architectures.md``: what every architecture was found to do, as a page that can be read back.

A row of the page is exactly what a fresh audit renders to, so drift is a comparison of strings, and every
total is counted from rows: ``parse`` and ``page`` are inverse to each other. May be changed here: columns,
wording, and what counts as right. What is checked belongs to ``audit.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ttt_compiler.architectures.audit import NONE, NOT_BUILT, NOT_CAPTURED, OK, OWN_DECODE, Audit
from ttt_compiler.architectures.expected import KINDS

PAGE = "docs/architectures.md"
REFRESH = f"ttt-compiler doctor --architectures --write {PAGE}"
TARGET = 0.97

CELLS = (
    *("graphs", "found", "expected", "missing", "false", "converted", "refused"),
    *("base", "oracle", "decode"),
)
NO, OWN = "no", "base"

# Sections in the order of the page; what a row says there is part of the row.
MISSING = "MLPs that are not found"
FALSE = "Found, and no MLP"
KIND = "Found as another kind"
FAILED = "Checks that fail"
REFUSED = "Found and refused"
UNCHECKED = "Decode that the base model itself fails"
UNTRACED = "Types that torch.compile cannot capture"
UNSEARCHED = "Types that could not be audited"
UNBUILT = "Types that cannot be built"
SECTIONS = (MISSING, FALSE, KIND, FAILED, UNSEARCHED, REFUSED, UNCHECKED, UNTRACED, UNBUILT)
WRONG = (MISSING, FALSE, KIND, FAILED, UNSEARCHED)

# Errors depend on the processor in their last digits; whether there is one does not.
_MEASURED = re.compile(r"\d(\.\d+)?e[+-]\d\d")
_VERSIONS = re.compile(r"^On torch (\S+) and transformers (\S+), ", re.MULTILINE)
_ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$")
_NOTE = re.compile(r"^- `([^`]+)`: (.*)$")


class Versions(NamedTuple):
    """Of the libraries that an audit runs on, as ``"2.13"``."""

    torch: str
    transformers: str


@dataclass(frozen=True)
class Row:
    """One type as the page shows it.

    Attributes:
        model_type: as transformers calls it.
        cells: one string per name of ``CELLS``.
        notes: (section, words) of everything that a cell cannot say.
    """

    model_type: str
    cells: tuple[str, ...]
    notes: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, name: str) -> str:
        return self.cells[CELLS.index(name)]

    @property
    def line(self) -> str:
        """Its line of the table."""
        return f"| `{self.model_type}` | {' | '.join(self.cells)} |"

    @property
    def sections(self) -> set[str]:
        """Where it is mentioned."""
        return {section for section, _ in self.notes}

    @property
    def built(self) -> bool:
        """Whether there is a tiny model of it."""
        return UNBUILT not in self.sections

    @property
    def traced(self) -> bool:
        """Whether torch.compile captures it without this package, as far as is known."""
        return self.built and UNTRACED not in self.sections

    @property
    def wrong(self) -> bool:
        """Whether something is missing, found by mistake, or a check fails."""
        return bool(self.sections & {*WRONG})

    @property
    def right(self) -> bool:
        """Whether every MLP is found, nothing else is, and every check holds on what is converted."""
        return self.traced and not self.wrong

    @property
    def refused(self) -> bool:
        """Whether all is right, but an MLP that was found cannot be converted (routed ones not counted)."""
        return self.right and REFUSED in self.sections

    @property
    def converted(self) -> bool:
        """Whether something was converted."""
        return self["converted"] != NONE

    def same(self, other: Row) -> bool:
        """Whether both say the same, up to the digits of measured errors."""
        return self.comparable() == other.comparable()

    def comparable(self) -> list[str]:
        """The row in lines, without the digits of measured errors."""
        notes = (f"{section}: {_MEASURED.sub('..', words)}" for section, words in self.notes)
        return [self.line, *notes]


def row(audit: Audit) -> Row:
    """What the page says about one audited type."""
    notes = [(MISSING, x) for x in audit.missing]
    notes += [(FALSE, x) for x in audit.false_positives]
    notes += [(KIND, x) for x in audit.wrong_kind]
    checks = {"base": audit.base, "oracle": audit.oracle, "decode": audit.decode}
    cells = {name: _cell(value) for name, value in checks.items()}
    notes += [(FAILED, f"{name}: {checks[name]}") for name, cell in cells.items() if cell == NO]
    if audit.traced != OK and not audit.traced.startswith((NOT_BUILT, NOT_CAPTURED)):
        notes.append((UNSEARCHED, audit.traced))
    notes += [(REFUSED, x) for x in audit.refused]
    if cells["decode"] == OWN:
        notes.append((UNCHECKED, audit.decode.removeprefix(OWN_DECODE)))
    for prefix, section in ((NOT_CAPTURED, UNTRACED), (NOT_BUILT, UNBUILT)):
        if audit.traced.startswith(prefix):
            notes.append((section, audit.traced.removeprefix(prefix)))
    counts = _count(audit.found)
    cells |= {
        "graphs": str(audit.graphs) if audit.traced == OK else NO,
        "found": audit.found,
        "expected": audit.expected,
        "missing": _number(len(audit.missing)),
        "false": _number(len(audit.false_positives)),
        "converted": _number(audit.converted),
        "refused": _number(counts["dense"] + counts["shared"] - audit.converted if audit.refused else 0),
    }
    return Row(
        audit.model_type,
        tuple(cells[name] for name in CELLS),
        tuple((section, _words(words)) for section, words in notes),
    )


def render(audits: Iterable[Audit], versions: Versions) -> str:
    """The page of these audits, in the order of their types."""
    return page((row(a) for a in audits), versions)


def page(rows: Iterable[Row], versions: Versions) -> str:
    """The page of these rows, in the order of their types."""
    rows = sorted(rows, key=lambda r: r.model_type)
    lines = [
        "# Architectures",
        "",
        f"Every causal language model type of transformers, tiny and random, under every check. Written by "
        f"`{REFRESH}`; edit nothing here.",
        f"On torch {versions.torch} and transformers {versions.transformers}, in fp32 on a CPU, with the "
        "rewritten graphs run op by op:",
        "",
        *(f"- {line}" for line in totals(rows)),
        "",
        "| type | " + " | ".join(CELLS) + " |",
        "|---|" + "---|" * len(CELLS),
        *(r.line for r in rows if r.built),
        "",
        *_LEGEND,
    ]
    for section in SECTIONS:
        notes = [(r.model_type, words) for r in rows for where, words in r.notes if where == section]
        if notes:
            lines += ["", f"## {section}", "", *(f"- `{name}`: {words}" for name, words in notes)]
    return "\n".join(lines) + "\n"


_LEGEND = (
    "`graphs`: how many it is captured in. `found` and `expected`: MLP down-projections by dataflow and by",
    "name; `moe` are routed experts, `shared` an expert beside them that every token goes through. `false`:",
    "found, and by name none. `refused`: found, and cannot be converted. `base`: with an untrained adapter",
    "the logits equal the base model's bit for bit. `oracle`: with a random adapter they equal the reference",
    "run eagerly. `decode`: prefill and decode through the model's own cache equal one forward; `base`:",
    "the unconverted model fails that itself. `-`: none, or nothing to check. A `no` has its reason below.",
)


def totals(rows: Sequence[Row]) -> list[str]:
    """What the rows add up to, in sentences."""
    built, traced = [r for r in rows if r.built], [r for r in rows if r.traced]
    found: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for r in traced:
        have, want = _count(r["found"]), _count(r["expected"])
        expected += want
        found += have & want
    right = [r for r in traced if r.right]
    whole = [r for r in right if not r.refused]
    converted = [r for r in whole if r.converted]
    mlps = ", ".join(f"{found[k]} of {expected[k]} {k}" for k in KINDS)
    false = sum(_count_cell(r["false"]) for r in rows)
    return [
        f"types: {len(rows)}, of which {len(built)} can be built; torch.compile captures {len(traced)} of "
        f"these, {sum(r['graphs'] == '1' for r in traced)} in one graph.",
        f"MLPs found: {mlps}. False positives: {false}.",
        f"right: {_share(right, traced)}; the target is at least {100 * TARGET:.0f} %. Every MLP is found, "
        "nothing else is, and every check holds on what is converted.",
        f"converted and right: {_share(converted, traced)}. Right with nothing to convert (no MLP, or routed "
        f"experts alone): {len(whole) - len(converted)}.",
        f"right, but an MLP is refused, with the reason below: {len(right) - len(whole)}. "
        f"Wrong: {sum(r.wrong for r in rows)}.",
    ]


def _share(rows: Sequence[Row], of: Sequence[Row]) -> str:
    percent = f" ({100 * len(rows) / len(of):.1f} %)" if of else ""
    return f"{len(rows)} of {len(of)} captured types{percent}"


def share(rows: Iterable[Row]) -> float:
    """The part of the captured types that is right."""
    traced = [r for r in rows if r.traced]
    return sum(r.right for r in traced) / len(traced) if traced else 0.0


def wrongs(rows: Iterable[Row]) -> list[str]:
    """Everything that is wrong or refused, a line each."""
    return [
        f"{r.model_type}: {section}: {words}"
        for r in sorted(rows, key=lambda r: r.model_type)
        for section, words in r.notes
        if section in (*WRONG, REFUSED, UNTRACED)
    ]


def parse(text: str) -> tuple[dict[str, Row], Versions]:
    """The rows of a page by type, and the versions that it was written on.

    Raises:
        ValueError: the text is no such page.
    """
    versions = _VERSIONS.search(text)
    if versions is None:
        raise ValueError(f"this is no page of architectures. Type: {REFRESH}")
    cells: dict[str, tuple[str, ...]] = {}
    notes: dict[str, list[tuple[str, str]]] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif found := _ROW.match(line):
            cells[found[1]] = tuple(found[2].split(" | "))
        elif section and (found := _NOTE.match(line)):
            notes.setdefault(found[1], []).append((section, found[2]))
    return _rows(cells, notes), Versions(versions[1], versions[2])


def _rows(cells: Mapping[str, tuple[str, ...]], notes: Mapping[str, list[tuple[str, str]]]) -> dict[str, Row]:
    empty = row(Audit("", traced=NOT_BUILT)).cells
    names = sorted({*cells, *notes})
    return {name: Row(name, cells.get(name, empty), tuple(notes.get(name, ()))) for name in names}


def _cell(value: str) -> str:
    return value if value in (OK, NONE) else OWN if value.startswith(OWN_DECODE) else NO


def _number(count: int) -> str:
    return str(count) if count else NONE


def _count_cell(cell: str) -> int:
    return 0 if cell == NONE else int(cell)


def _count(counts: str) -> Counter[str]:
    """``"2 dense, 1 moe"`` as numbers."""
    return Counter({kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", counts)})


def _words(text: str) -> str:
    """One line that Markdown shows as it is."""
    return " ".join(text.split()).replace("<", "&lt;")
