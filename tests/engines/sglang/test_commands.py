"""SGLang reads the flags of every command in README and docs."""

import argparse

import pytest

from commands import of


@pytest.fixture(scope="module")
def parser():
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    ServerArgs.add_cli_args(found := argparse.ArgumentParser())
    return found


@pytest.mark.parametrize("command", of("sglang.launch_server"), ids=str)
def test_sglang_reads_the_flags(parser, command):
    assert parser.parse_args(command.arguments).model_path
