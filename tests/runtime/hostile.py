"""Files as somebody who means harm would write them: changed, and with a checksum that fits."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

ZEROS = "0" * 64


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Safetensors header and data of a file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def put(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Write a file of a header (with its checksum made to fit) and data."""
    if isinstance(header, dict):
        metadata = header.get("__metadata__", {})
        if str(metadata.get("ttt_checksum", "")).startswith("sha256:"):
            metadata["ttt_checksum"] = f"sha256:{ZEROS}"
            text = json.dumps(header).encode()
            digest = hashlib.sha256(struct.pack("<Q", len(text)) + text + data).hexdigest()
            metadata["ttt_checksum"] = f"sha256:{digest}"
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the safetensors header of a file."""
    header, data = parts(path)
    change(header)
    put(path, header, data)


def edit_ours(path: Path, **values: Any) -> None:
    """Change our own part of the header of a file."""

    def change(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        metadata["ttt"] = json.dumps(json.loads(metadata["ttt"]) | values)

    edit(path, change)
