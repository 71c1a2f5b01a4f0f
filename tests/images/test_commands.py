"""The `image` commands as people use them."""

import re
from pathlib import Path

import pytest

from polytropo import service
from polytropo.compose import Image, Stack
from polytropo.errors import PolytropoError
from polytropo.state import State
from tests.conftest import POLYTROPO, Isolated
from tests.images.archives import Layout, config_of
from tests.images.test_import import BASE, TOP


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    config = config_of([BASE, TOP], Env=["A=1"], Cmd=["sh", "-c", "ls"], ExposedPorts={"80/tcp": {}})
    return Layout(tmp_path / "app").image([BASE, TOP], ref="1.0", config=config).path


@pytest.mark.timeout(120)
def test_from_import_to_rm(isolated: Isolated, layout: Path, tmp_path: Path) -> None:
    told = isolated.polytropo("image", "import", layout).stdout
    assert re.fullmatch(r"[0-9a-f]{12}  app:1\.0\n", told)
    [shown] = isolated.json("image", "list")
    assert (shown["names"], len(shown["layers"]), shown["config"]["Env"]) == (["app:1.0"], 2, ["A=1"])
    assert isolated.json("image", "show", shown["digest"][7:15]) == shown
    text = isolated.polytropo("image", "show", "app:1.0").stdout
    assert re.search(r"^command +sh -c ls$", text, re.M) and re.search(r"^ports +80/tcp$", text, re.M)
    isolated.polytropo("image", "tag", "app:1.0", "other")
    table = isolated.polytropo("image", "list").stdout.splitlines()
    assert table[0].split() == ["NAME", "ID", "LAYERS", "SIZE", "IMPORTED"]
    assert [line.split()[0] for line in table[1:]] == ["app:1.0", "other:latest"]
    [usage] = isolated.json("system", "df", "--verbose")["images"]
    assert (
        usage["names"] == ["app:1.0", "other:latest"] and usage["shared_bytes"] == 0 < usage["unique_bytes"]
    )
    assert "other:latest" in isolated.polytropo("system", "df", "-v").stdout
    isolated.polytropo("image", "save", "other", "-o", tmp_path / "saved.tar")
    assert isolated.polytropo("image", "rm", "app:1.0").stdout == "app:1.0\n"
    assert isolated.polytropo("image", "rm", "other").stdout == f"{shown['digest']}\n"
    assert isolated.json("image", "list") == []
    isolated.run("sh", "-c", f"{POLYTROPO} image import - < {tmp_path}/saved.tar")
    piped = f"{POLYTROPO} image save app:1.0 | {POLYTROPO} image import - --name piped"
    isolated.run("sh", "-c", piped)
    [again] = isolated.json("image", "list")
    assert again["names"] == ["app:1.0", "other:latest", "piped:latest"]


@pytest.mark.timeout(120)
def test_layers_of_a_mounted_image_stay_until_it_is_unmounted(
    isolated: Isolated, layout: Path, tmp_path: Path
) -> None:
    isolated.polytropo("image", "import", layout)
    at = tmp_path / "at"
    at.mkdir()
    isolated.polytropo("mount", "app:1.0", at)
    isolated.polytropo("image", "rm", "app:1.0")
    isolated.polytropo("system", "prune")
    assert isolated.run("cat", at / "etc/group", at / "bin/tool").stdout.startswith("x\x7fELF")
    isolated.polytropo("unmount", at)
    isolated.polytropo("system", "prune")
    assert list(isolated.state.layers.glob("sha256/*")) == []


def test_layers_stay_between_look_up_and_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State.open(tmp_path / "home")

    def mounting(*_: object) -> Path:
        with pytest.raises(PolytropoError, match="held the lock layers"):
            state.lock("layers", timeout_s=0)  # as whoever clears layers does
        return tmp_path

    monkeypatch.setattr(service, "_mount", mounting)
    assert service.mount(state, None, Stack(Image("app")), tmp_path) == tmp_path


@pytest.mark.timeout(120)
def test_a_damaged_image_is_told_of_and_can_be_removed(isolated: Isolated, layout: Path) -> None:
    isolated.polytropo("image", "import", layout)
    [shown] = isolated.json("image", "list")
    record = isolated.home / "layers/sha256" / shown["layers"][0]["diff_id"][7:] / "layer.json"
    record.unlink()
    done = isolated.polytropo("image", "list", "--json")
    assert done.stdout == "[]\n" and "lacks its layer" in done.stderr
    isolated.polytropo("image", "rm", "app:1.0")
    isolated.polytropo("image", "import", layout)
    assert isolated.json("image", "list") == [
        shown | {"imported_unix_s": isolated.json("image", "list")[0]["imported_unix_s"]}
    ]


@pytest.mark.timeout(120)
def test_bad_input_gets_a_sentence(isolated: Isolated, layout: Path, tmp_path: Path) -> None:
    there_is_none = 'there is no image "app"; there is none yet; make one with `polytropo image bootstrap`'
    for command in (
        ["show", "app"],
        ["rm", "app"],
        ["tag", "app", "b"],
        ["save", "app", "-o", tmp_path / "x"],
    ):
        assert isolated.refused("image", *command) == there_is_none
    isolated.polytropo("image", "import", layout)
    told = isolated.refused("image", "import", tmp_path / "nothing")
    assert re.fullmatch("cannot read the image: .*/nothing: No such file or directory", told), told
    told = isolated.refused("image", "import", layout, "--name", "Upper Case")
    assert '"Upper Case" cannot name an image' in told
    assert "cannot name an image" in isolated.refused("image", "tag", "app:1.0", "a b")
    told = isolated.refused("image", "import", tmp_path)
    assert "it is a directory without index.json and oci-layout" in told
    assert not (tmp_path / "x").exists()
