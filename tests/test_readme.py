"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_usage_example(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = next(b for b in blocks if "ttt.convert" in b)
    assert len([line for line in example.splitlines() if line.strip()]) == 10
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["out"].shape == (1, 45)
    assert (tmp_path / "book.ttt").exists()
    assert scope["later"].tokens_seen == scope["session"].tokens_seen == [44]
    assert "model.layers.0.mlp.down_proj.weight" in capsys.readouterr().out


def test_exactly_two_set_up_commands():
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    assert "ttt-compiler demo" in commands[0]
    assert "pytest" in commands[1]
