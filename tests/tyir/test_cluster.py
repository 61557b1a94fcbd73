"""Files of what links machines to each other, and the times that follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.targets.cluster import load_cluster
from tyir.targets.machine import load_machine

LINK = """
name = "two PCs"
[link]
hop_us = { value = 60, label = "fitted", source = "test" }
bandwidth_gbps = { value = 1, label = "fitted", source = "test" }
exchange_us = { value = 150, label = "fitted", source = "test" }
"""


def test_times_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(LINK)
    cluster = load_cluster(file)
    assert cluster.name == "two PCs" and cluster.constants["link.hop_us"].source == "test"
    assert cluster.message_ns(4096) == 60_000 + 4096
    assert cluster.exchange_ns(4096, 2) == 150_000 + 60_000 + 4096
    assert cluster.exchange_ns(4096, 3) == 2 * 150_000 + 60_000 + 2 * 4096
    assert cluster.exchange_ns(4096, 1) == 0


def test_what_is_wrong_is_named_together(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(LINK.replace("hop_us", "hops_us").replace("value = 1,", "value = -1,"))
    with pytest.raises(TyirError) as caught:
        load_cluster(file)
    messages = [d.message for d in caught.value.diagnostics]
    assert any("unknown constant 'link.hops_us'" in m for m in messages)
    assert any("link.bandwidth_gbps" in m and "-1" in m for m in messages)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the cluster file .*: No such file"),
        (b"\xff", "cannot read the cluster file .*: it is not UTF-8"),
        (b"link = ", "not valid TOML"),
    ],
)
def test_a_file_that_is_none_is_told_as_a_clusters(content: bytes | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TyirError, match=f"{said}(.|\n)*docs/processes.md"):
        load_cluster(file)


def test_cards_are_packages_whose_dies_share_the_link(tmp_path: Path) -> None:
    """By hand: a hop with its exchange is 60 + 150 us, an eighth of 1 GB/s."""
    file = tmp_path / "cluster.toml"
    guessed = LINK.replace('60, label = "fitted"', '60, low = 50, high = 90, label = "assumed"')
    for text, bounds in ((LINK, (None, None)), (guessed, (200, 240))):
        file.write_text(text)
        machine = load_cluster(file).joined(load_machine(), 8)
        hop = machine.constants["c2c.hop_us"]
        assert machine.d2d.package_dies == 8 and machine.dram == load_machine().dram
        assert (machine.c2c.hop_us, machine.c2c.bandwidth_gbps) == (210, 0.125)
        assert (hop.low, hop.high) == bounds and "two PCs" in hop.source
        assert hop.label == ("fitted" if text is LINK else "assumed")
        (tmp_path / "machine.toml").write_text(machine.as_toml())
        assert load_machine(tmp_path / "machine.toml") == machine
