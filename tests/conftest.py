"""pytest's configuration: `*.ir` files are tests (`tyir.tools.testing`), `--slow` runs what is marked so."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.once import once
from tests.tally import table

# Named here too, so that a checkout needs no installed entry point; pytest loads a plugin of one name once.
pytest_plugins = ["tyir.tools.testing.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """Random inputs are the same in every run: a change is judged by itself.  `--slow` looks for new ones.

    Signals are as a terminal leaves them: what nohup and a shell's `&` ignore, commands of tests would too.
    """
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("default" if config.getoption("--slow") else "repeatable")
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    for name, handler in usual.items():
        if (number := getattr(signal, name, None)) and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands keep what they compile in a folder of this run, not in the user's.  Kernels of calls that have
    no cache are shared by the processes of the run: what LLVM makes of one is made once.
    """
    from tyir.backends.host import objects
    from tyir.process.cache import Cache

    shared = Cache.open(once(tmp_path_factory, "kernels", lambda folder: None))
    read_or_made = objects._read_or_made
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(
            objects, "_read_or_made", lambda key, make, cache: read_or_made(key, make, cache or shared)
        )
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--bless", dest="bless_ir", action="store_true", help="the same as --bless-ir")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := table(report for reports in terminalreporter.stats.values() for report in reports):
        terminalreporter.section("reliability: cases tried and survived")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
