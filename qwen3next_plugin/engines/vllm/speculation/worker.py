"""vLLM's CPU worker with our drafter and verification, and with seeds that survive long prompts.

A worker class is a setting of vLLM's (`--worker-cls`); flags.py chooses this one. Nothing of the
host is replaced but what stands in this worker's own runner.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.worker.cpu_worker import CPUWorker

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.vllm.names import logger
from qwen3next_plugin.engines.vllm.speculation.drafter import Drafter
from qwen3next_plugin.engines.vllm.speculation.verify import CoupledSampler
from qwen3next_plugin.model.state import StateError
from qwen3next_plugin.model.step import StepError

MEND = (
    "The state page is not this request's, or was written by something else; nothing was computed "
    "from it. Restart the engine; if it happens again, with --no-enable-prefix-caching and without "
    "a KV connector, which move pages, and report this line"
)


class Worker(CPUWorker):
    """Serves the model on a CPU."""

    def init_device(self) -> None:
        """Build the runner, then give it what is ours, before anything is loaded."""
        if self.use_v2_model_runner:
            raise ConfigError("no model runner V2 on a CPU: set VLLM_USE_V2_MODEL_RUNNER=0")
        super().init_device()
        runner = self.model_runner
        if hasattr(runner, "rejection_sampler"):  # with speculation, on the last stage
            runner.rejection_sampler = CoupledSampler(runner.sampler)
            _complete(runner.input_batch.logitsprocs, runner)
            if self.parallel_config.data_parallel_size == 1:
                runner.drafter = Drafter(self.vllm_config, self.device, runner)
                # Near its end our loop drafts less for that request; vLLM's drafts zeros for all.
                runner.effective_drafter_max_model_len += runner.num_spec_tokens
            else:
                logger.info("data parallel: drafts of fixed length, by vLLM's own loop")

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step; what is wrong with one row names its request, which only the runner knows."""
        try:
            return super().execute_model(scheduler_output)
        except (StateError, StepError) as error:
            raise _naming_its_request(error, self.model_runner.input_batch.req_ids) from error

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and let unfinished prompts draw nothing."""
        with _unfinished_prompts_set_aside(self.model_runner):
            return super().sample_tokens(grammar_output)


def _naming_its_request(
    error: StateError | StepError, requests: Sequence[str | None]
) -> RuntimeError:
    row = error.row
    whose = "a step" if row is None or row >= len(requests) else f"request {requests[row]}"
    return RuntimeError(f"{whose}: {error}. {MEND}")


def _complete(processors: Any, runner: Any) -> None:
    """Add vLLM's own min_p and logit_bias, which it leaves out under speculation."""
    present = {type(processor) for processor in processors.all}
    for kind in BUILTIN_LOGITS_PROCESSORS:
        if kind not in present:
            processor = kind(runner.vllm_config, runner.device, False)
            invariant = processor.is_argmax_invariant()
            (processors.argmax_invariant if invariant else processors.non_argmax_invariant).append(
                processor
            )


@contextmanager
def _unfinished_prompts_set_aside(runner: Any) -> Iterator[None]:
    """Take the generators of requests whose prompt is not through yet out of the batch.

    vLLM samples for them too, throws the token away and turns the generator back by an offset,
    which a CPU generator does not have: a seeded prompt in more than one chunk would end the engine
    (0.32, `_bookkeeping_sync`). Can go when vLLM asks for no offset: a test marked `compat`.
    """
    batch = runner.input_batch
    unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    aside = {i: batch.generators.pop(i) for i in unfinished if i in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(aside)
