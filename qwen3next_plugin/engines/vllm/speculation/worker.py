"""vLLM's CPU worker with our drafter and verification, and with seeds that work for long prompts.

vLLM has a setting for the class (`--worker-cls`); flags.py chooses this one. It changes objects of
its own runner only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.worker.cpu_worker import CPUWorker

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.cpu import page_copy
from qwen3next_plugin.engines.vllm.cpu.seeded_prompts import without_generators_of_prompts
from qwen3next_plugin.engines.vllm.executor import Sampled
from qwen3next_plugin.engines.vllm.model.loading import one_bar
from qwen3next_plugin.engines.vllm.patches import When, apply
from qwen3next_plugin.engines.vllm.speculation.drafter import Drafter
from qwen3next_plugin.engines.vllm.speculation.sampler import (
    NO_TOKEN,
    CoupledSampler,
    drafts_and_rows,
)
from qwen3next_plugin.model.checkpoint.mapped import keep_freed
from qwen3next_plugin.model.state import StateError
from qwen3next_plugin.model.step import StepError

FIX = (
    "The state page belongs to another request, or something else wrote to it, so nothing was "
    "computed from it. Restart the engine. If it happens again, report this line, and run with "
    "--no-enable-prefix-caching and without a KV connector, because both move pages"
)


WARM_UP = 32  # tokens, enough for compiled loops to be shared by all threads


class Worker(CPUWorker):
    """Serves the model on a CPU, with or without MTP."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        apply(When.IN_WORKER)
        page_copy.provide()
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)

    @override(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.effective_drafter_max_model_len",
        reason="vLLM drafts zeros for all requests when one is near its maximum length; our "
        "drafter drafts less for that one",
        remove_when="vLLM leaves that limit to the drafter",
        upstream="https://github.com/vllm-project/vllm/issues/58080",
    )
    @override(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states_after_model_execute",
        reason="vLLM counts accepted drafts, and looks for state pages to copy, in every step",
        remove_when="vLLM does neither where nothing was drafted and no block is filled",
    )
    @override(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._calc_spec_decode_metadata",
        reason="vLLM prepares seven tensors, most for its rejection sampler; ours needs two",
        remove_when="vLLM leaves the metadata of drafts to the sampler",
    )
    @override(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.drafter",
        reason="each request needs its own draft length",
        remove_when="vLLM lets a model bring its drafter",
    )
    @override(
        "vllm.v1.worker.gpu_input_batch.InputBatch.logitsprocs",
        reason="vLLM leaves its min_p and logit_bias processors out under speculation",
        remove_when="vLLM refuses neither (`compat`)",
        upstream="https://github.com/vllm-project/vllm/issues/42744",
    )
    @override(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.rejection_sampler",
        reason="drafts are verified by the plain sampler, so that a seed gives the same tokens "
        "with and without drafts",
        remove_when="vLLM's rejection sampler draws what its plain sampler draws (`compat`)",
    )
    def init_device(self) -> None:
        """Build the runner and add what is ours, before anything is loaded."""
        super().init_device()
        extras.start("vllm", self.vllm_config)
        runner = self.model_runner
        if hasattr(runner, "rejection_sampler"):  # with MTP, on the last pipeline stage
            runner.rejection_sampler = CoupledSampler(runner.sampler)
            _add_missing_processors(runner.input_batch.logitsprocs, runner)
            runner.drafter = Drafter(self.vllm_config, self.device, runner)
            runner._calc_spec_decode_metadata = drafts_and_rows(runner)
            runner._update_states_after_model_execute = _count_accepted(runner)
            # Near the longest context, or the drafter's, vLLM skips drafting for the whole batch.
            # Our drafter drafts less for that one request instead.
            runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load trunk and MTP layer, and show the progress."""
        with one_bar(self.vllm_config):
            super().load_model(load_dummy_weights=load_dummy_weights)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Make the pools, whose size depends on the memory in use, and the KV connector."""
        super().initialize_from_config(kv_cache_config)
        keep_freed()

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
    ) -> str | None:
        """Let an extra replace the weights of trunk and drafter; returns why they are refused."""
        if (reload := extras.reloader("vllm")) is not None:
            return reload(self, weights_path, weights_iterator)
        # vLLM reads the ranks' answers in order, and stops at an error.
        if self.rank == self.parallel_config.world_size - 1:
            raise ConfigError(f"reload_weights: {extras.MISSING}; restart the server")
        return None

    def determine_available_memory(self) -> int:
        """Bytes for the pools, after vLLM has compiled the model in its first run."""
        with _few_tokens(self.model_runner):
            return super().determine_available_memory()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step. An error of a row names its request, known only here."""
        try:
            return super().execute_model(scheduler_output)
        except (StateError, StepError) as error:
            raise _naming_its_request(error, self.model_runner.input_batch.req_ids) from error

    def take_draft_token_ids(self) -> Any:
        """The drafts; None if no request has any."""
        drafts = self.model_runner._draft_token_ids
        return super().take_draft_token_ids() if drafts is None or any(map(len, drafts)) else None

    def run_step(self, scheduler_output: SchedulerOutput) -> Sampled:
        """Run the model and sample, for our executor."""
        output = self.execute_model(scheduler_output)
        return self.sample_and_draft(None) if output is None else (output, None)

    def sample_and_draft(self, grammar_output: GrammarOutput | None) -> Sampled:
        """The sampled tokens and the drafts after them, for our executor."""
        output = self.sample_tokens(grammar_output)
        drafts = self.take_draft_token_ids() if self.model_runner.num_spec_tokens else None
        return output, drafts

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, without random draws for unfinished prompts."""
        with without_generators_of_prompts(self.model_runner):
            return super().sample_tokens(grammar_output)


def _count_accepted(runner: Any) -> Callable[..., None]:
    """vLLM's method, reduced to counting accepted tokens if no request can have filled a block.

    Without drafts each full block of the prefix cache is in place already, so nothing is copied.
    """
    host = runner._update_states_after_model_execute

    def update(output_token_ids: torch.Tensor, scheduler_output: Any) -> None:
        count, width = output_token_ids.shape
        if width > 1 and _may_fill_a_block(runner, count):
            host(output_token_ids, scheduler_output)
            return
        accepted = 1 if width == 1 else (output_token_ids.numpy() != NO_TOKEN).sum(1)
        runner.num_accepted_tokens.np[:count] = accepted
        runner.input_batch.num_accepted_tokens_cpu[:count] = accepted

    return update


def _may_fill_a_block(runner: Any, count: int) -> bool:
    """Whether a request may have filled a block whose state the prefix cache keeps."""
    if runner.cache_config.mamba_cache_mode != "align":
        return False
    block_size = runner._get_mamba_bufs().preprocess.mamba_spec.block_size
    computed = runner.input_batch.num_computed_tokens_cpu[:count]
    end = computed + runner.num_scheduled_tokens.np[:count]
    return bool((computed // block_size != end // block_size).any())


def _naming_its_request(
    error: StateError | StepError, requests: Sequence[str | None]
) -> RuntimeError:
    row = error.row
    whose = "a step" if row is None or row >= len(requests) else f"request {requests[row]}"
    return RuntimeError(f"{whose}: {error}. {FIX}")


@contextmanager
def _few_tokens(runner: Any) -> Iterator[None]:
    """Keep vLLM from warming up with the largest step: graphs serve any number of tokens.

    The pools get no larger by this, because malloc returns a step's large blocks when it ends.
    """
    most = runner.max_num_tokens
    runner.max_num_tokens = min(most, WARM_UP)
    try:
        yield
    finally:
        runner.max_num_tokens = most


def _add_missing_processors(processors: Any, runner: Any) -> None:
    """Add vLLM's own min_p and logit_bias, which it leaves out with speculation."""
    present = {type(processor) for processor in processors.all}
    for kind in BUILTIN_LOGITS_PROCESSORS:
        if kind not in present:
            processor = kind(runner.vllm_config, runner.device, False)
            invariant = processor.is_argmax_invariant()
            (processors.argmax_invariant if invariant else processors.non_argmax_invariant).append(
                processor
            )
