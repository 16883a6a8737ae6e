"""vLLM's executor of worker processes, with one call a step.

vLLM calls its worker to run the model, again to sample, and with MTP again to fetch drafts, even if
there are none. Each call wakes one process and then the other: for a small model, a large part of a
step. vLLM has a setting for the class (`--distributed-executor-backend`).
"""

from concurrent.futures import Future
from multiprocessing.util import Finalize
from typing import Any

from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from qwen3next_plugin.engines import extras

Sampled = tuple[ModelRunnerOutput, DraftTokenIds | None]  # of a worker: sampled tokens, next drafts


class Executor(MultiprocExecutor):
    """Runs a step, samples and fetches drafts in one call; in two with grammars."""

    drafts: DraftTokenIds | None = None  # of the last step

    def _init_executor(self) -> None:
        """Start the workers; stop them before multiprocessing waits for them.

        If the engine fails while they run (for example on a full disk), vLLM leaves them to
        multiprocessing, which sends SIGTERM once and waits forever: the worker's handler raises
        SystemExit, which Python drops if it is in a weak reference's callback.
        """
        Finalize(None, self.shutdown, exitpriority=1)
        extras.start("vllm", self.vllm_config)
        super()._init_executor()

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Run the model, and sample too, unless sampling needs a grammar's mask."""
        if (
            scheduler_output.has_structured_output_requests
            or not scheduler_output.total_num_scheduled_tokens
            or self.ec_output_aggregator is not None
        ):
            return super().execute_model(scheduler_output, non_block)
        output = PendingOutput(self, self._call("run_step", scheduler_output))
        return output if non_block else output.result()

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """Sample, and take the drafts."""
        if self.ec_output_aggregator is not None:
            return super().sample_tokens(grammar_output, non_block)
        output = PendingOutput(self, self._call("sample_and_draft", grammar_output))
        return output if non_block else output.result()

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The drafts, which arrived with the sampled tokens."""
        if self.ec_output_aggregator is not None:
            return super().take_draft_token_ids()
        return self.drafts

    def _call(self, method: str, argument: Any) -> "Future[Sampled]":
        host = self.kv_output_aggregator
        return self.collective_rpc(
            method,
            args=(argument,),
            non_block=True,
            unique_reply_rank=self.output_rank,
            timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            kv_output_aggregator=host and Aggregator(host),
        )


class Aggregator:
    """Joins a KV connector's reports from all ranks, as vLLM does, and keeps a step's drafts."""

    def __init__(self, host: KVOutputAggregator) -> None:
        self.host = host

    def aggregate(self, sampled: list[Sampled], output_rank: int) -> Sampled:
        """What one rank sampled, with all ranks' reports in its output."""
        output = self.host.aggregate([output for output, _ in sampled], output_rank)
        return output, sampled[output_rank][1]


class PendingOutput(Future[ModelRunnerOutput]):
    """The sampled tokens of a step; reading them also gives the executor the drafts."""

    def __init__(self, executor: Executor, sampled: "Future[Sampled]") -> None:
        super().__init__()
        self.executor, self.sampled = executor, sampled

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        """Wait for the step."""
        output, self.executor.drafts = self.sampled.result(timeout)
        return output
