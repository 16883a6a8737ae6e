"""The CPU worker, with our drafter in place of vLLM's.

vLLM chooses a drafter by the method's name, from a closed list. `worker_cls` is its supported way
to bring an own worker; `checks` sets it for a Qwen3-Next model with MTP, where the user left it
alone.
"""

from vllm.v1.worker.cpu_worker import CPUWorker

from qwen3next_plugin.engines.vllm.drafter import Drafter


class Worker(CPUWorker):
    """Swaps the drafter once the runner stands, before anything is loaded."""

    def init_device(self) -> None:
        """Construct the runner, then our drafter, which is one of the host's by class."""
        super().init_device()
        runner = self.model_runner
        runner.drafter = Drafter(self.vllm_config, runner.device, runner)
