"""Print the goldens table: case x quantity -> relative error."""

from __future__ import annotations

import torch

from tests.goldens.test_official import CASES, measure


def main() -> None:
    rows = {}
    for case in CASES:
        torch._dynamo.reset()
        rows[case.name] = measure(case)
    names = list(dict.fromkeys(k for row in rows.values() for k in row))
    print("| quantity | " + " | ".join(rows) + " |")
    print("|---|" + "---|" * len(rows))
    for name in names:
        cells = [
            "-" if name not in r else f"{r[name]:.1e}" if name != "greedy" else f"{int(r[name])} wrong"
            for r in rows.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
