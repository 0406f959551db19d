"""Seconds until a small compiled model has answered, and decoded: static and ours, with or without files."""

from __future__ import annotations

import statistics

from bench.startup import CHUNK, TOKENS, WHO, fresh


def test_startup(benchmark, tmp_path, request):
    """In every round each one has a cold start in a folder of its own, and a warm one."""
    rounds = request.config.getoption("--rounds") or 5
    found: dict[str, list[dict[str, float]]] = {
        f"{who}, {how}": [] for who in WHO for how in ("cold", "warm")
    }

    def one_round() -> None:
        turn = len(found["ours, warm"])
        for who in WHO if turn % 2 else WHO[::-1]:
            folder = tmp_path / f"{who}{turn}"
            for how in ("cold", "warm"):
                found[f"{who}, {how}"].append(fresh(who, folder))

    benchmark.pedantic(one_round, rounds=rounds)
    seconds = {
        name: {phase: statistics.median(start[phase] for start in starts) for phase in starts[0]}
        for name, starts in found.items()
    }

    def ratio(phase: str) -> dict[str, float]:
        taken = {name: phases[phase] for name, phases in seconds.items()}
        return {how: taken[f"ours, {how}"] / taken[f"static, {how}"] for how in ("cold", "warm")}

    benchmark.extra_info |= {
        "kind": "startup",
        "shape": {"model": "Llama, 1 layer, D=64", "tokens": TOKENS, "chunk": CHUNK},
        "seconds": seconds,
        "ratio": ratio("until the first answer"),
        "ratio_token": ratio("until the first token"),
    }
