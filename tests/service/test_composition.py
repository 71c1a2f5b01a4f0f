"""Stacks of several layers, mounted by name and by document."""

import json
from pathlib import Path

from tests.conftest import Isolated
from tests.stacks import write_stack


def test_upper_keeps_the_changes(isolated: Isolated, data: Path, mnt: Path) -> None:
    upper = isolated.directory / "upper"
    upper.mkdir()
    isolated.polytropo("mount", data, mnt, "--upper", upper)
    isolated.run("sh", "-c", 'echo other >"$1/file"; rm -f "$1/gone"; echo new >"$1/new"', "sh", mnt)
    assert (data / "file").read_text() == "content\n" and not (data / "new").exists()
    assert (upper / "file").read_text() == "other\n"
    isolated.polytropo("unmount", mnt)


def test_documents_from_files_and_standard_input(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("volume", "create", "orders")
    document = write_stack(
        isolated.directory / "stack.json",
        {
            "kind": "union",
            "lowers": [{"kind": "dir", "path": str(data)}],
            "upper": {"kind": "volume", "name": "orders"},
        },
    )
    isolated.polytropo("mount", document, mnt)
    isolated.run("sh", "-c", 'echo 1 >"$1/order"', "sh", mnt)
    isolated.polytropo("unmount", mnt)
    assert (isolated.state.volumes / "default/orders/data/order").read_text() == "1\n"

    fault = {
        "kind": "fault",
        "below": {"kind": "dir", "path": str(data)},
        "rules": [{"operation": "read", "errno": "EIO"}],
    }
    isolated.polytropo("mount", "-", mnt, stdin=json.dumps({"version": 1, "root": fault}))
    assert "Input/output error" in isolated.run("cat", mnt / "file", check=False).stderr
    isolated.polytropo("unmount", mnt)


def test_a_fault_on_no_operation_is_refused(isolated: Isolated, data: Path, mnt: Path) -> None:
    rule = {"operation": "teleport", "errno": "EIO"}
    fault = {"kind": "fault", "below": {"kind": "dir", "path": str(data)}, "rules": [rule]}
    assert "teleport" in isolated.refused("mount", write_stack(isolated.directory / "f.json", fault), mnt)
