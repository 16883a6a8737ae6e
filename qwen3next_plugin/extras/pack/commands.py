"""The command that writes a packed checkpoint."""

from qwen3next_plugin.commands import Command
from qwen3next_plugin.extras.pack.pack import pack

COMMANDS = (
    Command(
        pack,
        "Example: [bold]qwen3next pack ./Qwen3.6-35B-A3B ./packed --quantise int4[/], then"
        " [bold]vllm serve ./packed[/] or [bold]sglang serve --model-path ./packed[/]. With"
        " QWEN3NEXT_MMAP=1 the weights stay in the files, which servers share and Linux pages.",
    ),
)
