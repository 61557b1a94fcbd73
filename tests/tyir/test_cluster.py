"""Files of what links machines to each other, and the times that follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.targets.cluster import load_cluster

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
