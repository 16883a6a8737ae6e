"""The commands that need no engine."""

from qwen3next_plugin.commands import Command
from qwen3next_plugin.extras.command_line.doctor import doctor
from qwen3next_plugin.extras.command_line.plan import plan
from qwen3next_plugin.extras.command_line.warmup import warmup
from qwen3next_plugin.extras.command_line.watch import watch

COMMANDS = (
    Command(
        doctor,
        "Example: [bold]qwen3next doctor --json[/]. Exit status 1 if anything is broken.",
    ),
    Command(
        plan,
        "Example: [bold]qwen3next plan ./Qwen3-Next-80B-A3B-Instruct --tp 4 --memory 80"
        " --max-model-len 32768 --max-num-seqs 64 --num-speculative-tokens 3[/]."
        " A folder with only config.json is enough: plan before you download."
        " Exit status 1 if no request fits.",
    ),
    Command(
        warmup,
        "Example: [bold]TRITON_CACHE_DIR=cache qwen3next warmup ./Qwen3-Next-80B-A3B-Instruct"
        " --arch sm_90 --tp 4 --num-speculative-tokens 3[/].",
    ),
    Command(
        watch,
        "Example: [bold]qwen3next watch http://localhost:8000[/]. vLLM needs no flag but MTP's own"
        " --speculative-config, SGLang --enable-metrics with NEXTN. Exit status 1 if the server has"
        " no such metrics, or goes away.",
    ),
)
