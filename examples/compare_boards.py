"""One compiled model on several machines, as figures to go on computing with: `python compare_boards.py OUT/{n}die MACHINE..`"""  # noqa: E501

from __future__ import annotations

import sys
from pathlib import Path

from tyir.tools.sim.sources import Choice, Lengths, open_source


def main(folder: Path, machines: list[str]) -> None:
    print(f"{'machine':<16}{'device ms a token':>18}{'bounds':>18}{'with the host':>15}  bound by")
    for name in machines:
        source = open_source([folder], Choice(name, {}))
        s = source.summary(Lengths(prompt=64, pos=64), curves=False)
        device = s.tpot_device_ms
        bounds = f"{device.fast:.4f}..{device.slow:.4f}"
        print(
            f"{s.machine:<16}{device.point:>18.4f}{bounds:>18}{s.tpot_ms.point:>15.4f}  {s.decode_bound_by}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
