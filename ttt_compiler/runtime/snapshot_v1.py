"""Sessions of format version 1: whole tables per site, two counters.

Nothing is changed here any more: it only lets old files be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_compiler.codegen.layout import COLUMNS, DONE, SEEN, WRITES
from ttt_compiler.errors import SnapshotError
from ttt_compiler.runtime.files import expect_tensors
from ttt_compiler.spec import SiteSpec


def from_version_1(
    fast: dict[str, Tensor], specs: Sequence[SiteSpec], batch: int, path: object
) -> dict[str, Tensor]:
    """The fast-weight tensors of a version 1 file, named and cut as version 2 has them.

    Raises:
        SnapshotError: they are not what version 1 wrote.
    """
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for s in specs:
        dtypes = [x.dtype for n in ("w", "tail_h") if (x := fast.get(f"fast.{s.key}.{n}")) is not None]
        acc, dtype = dtypes if len(dtypes) == 2 else (torch.float32, torch.float32)
        shapes = {
            "w": ((batch, s.d_model, s.d_ff), acc),
            "tail_h": ((batch, s.chunk, s.d_ff), dtype),
            "tail_t": ((batch, s.chunk, s.d_target), dtype),
            "counts": ((batch, 2), torch.int64),
        }
        expected |= {f"fast.{s.key}.{name}": shape for name, shape in shapes.items()}
    expect_tensors(fast, expected, path, SnapshotError)
    out: dict[str, Tensor] = {}
    for s in specs:
        w, tail_h, tail_t, counts = (fast[f"fast.{s.key}.{n}"] for n in ("w", "tail_h", "tail_t", "counts"))
        for b, (seen, writes) in enumerate(counts.tolist()):
            if seen < 0:
                raise SnapshotError(f"{path}: counters of {s.key} contradict each other; nothing was changed")
            rows = torch.zeros(COLUMNS, dtype=torch.int64)
            rows[SEEN], rows[DONE], rows[WRITES] = seen, seen // s.chunk, writes
            row = {
                "rows": rows,
                "norms": torch.zeros(3, dtype=w.dtype),
                "tail_h": tail_h[b, : seen % s.chunk],
                "tail_t": tail_t[b, : seen % s.chunk],
            }
            if writes > 0:
                row["w"] = w[b]
            out |= {f"fast.{s.key}.{b}.{name}": x for name, x in row.items()}
    return out


def layers_of_version_1(held: dict[str, Tensor]) -> list[dict[str, object]]:
    """What version 2 says of the same layers: version 1 knew keys and values of full attention only."""
    count = len(held) // 2
    return [{"kind": "DynamicLayer", "filled": f"cache.{i}.keys" in held} for i in range(count)]
