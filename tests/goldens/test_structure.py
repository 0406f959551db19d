"""The passes rewrite whole models into the graphs that were looked at before."""

from __future__ import annotations

import difflib

import pytest

from tests.goldens.structure import CASES, COMMAND, FOLDER, structure


@pytest.mark.parametrize("name", CASES)
def test_structure(name):
    path = FOLDER / f"{name}.txt"
    golden = path.read_text(encoding="utf-8") if path.exists() else ""
    fresh = structure(CASES[name]())
    diff = difflib.unified_diff(
        golden.splitlines(), fresh.splitlines(), f"{name}.txt", "after the passes", lineterm="", n=5
    )
    assert fresh == golden, "\n".join(["", *diff, "", f"If that is what you want, type: {COMMAND}"])


def test_no_golden_without_a_case():
    assert {path.stem for path in FOLDER.glob("*.txt")} == {*CASES}


@pytest.mark.parametrize("name", CASES)
def test_goldens_show_two_fast_weights_and_no_marker(name):
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert text.count("ttt.fast_weight_step" if name.endswith("-step") else "ttt.chunk_scan") == 2
    assert "ttt.site" not in text
