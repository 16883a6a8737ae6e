"""What tests ask inside an engine's process: `Offline.inside(name, …)` calls one with its LLM."""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm import LLM, SamplingParams
from vllm.compilation.counter import compilation_counter
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec

from page_faults import page_faults
from qwen3next_plugin.engines.pacing import Costs
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.model.quantisation.packing import Packed
from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.pending import MAX_BYTES, Pending
from qwen3next_plugin.mtp.policy import Policy
from qwen3next_plugin.mtp.rows import Row


def _core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def _drafter(llm: LLM) -> Any:
    return _core(llm).model_executor.driver_worker.worker.model_runner.drafter


def replace_adapter(llm: LLM, path: str, number: int) -> str:
    """Load an adapter in place of that with this number; returns the error."""
    try:
        llm.llm_engine.add_lora(LoRARequest(path, number, path, load_inplace=True))
    except Exception as error:
        return str(error)
    return ""


def count_calls(llm: LLM) -> None:
    """From now on count the calls of the worker processes, and the engine's steps and tokens."""
    core = _core(llm)
    executor, schedule = core.model_executor, core.scheduler.schedule
    host, counts = executor.collective_rpc, Counter()
    timeouts: set[float | None] = set()

    def calling(method: str, *args: Any, **options: Any) -> Any:
        counts[method] += 1
        timeouts.add(options.get("timeout"))
        return host(method, *args, **options)

    def scheduling(*args: Any) -> Any:
        scheduled = schedule(*args)
        counts["steps"] += scheduled.total_num_scheduled_tokens > 0
        counts["tokens"] += scheduled.total_num_scheduled_tokens
        return scheduled

    executor.collective_rpc, core.scheduler.schedule = calling, scheduling
    executor.counts, executor.timeouts = counts, timeouts


def calls(llm: LLM) -> dict[str, int]:
    """The calls since `count_calls`, by method, and the steps that scheduled tokens, and these."""
    return dict(_core(llm).model_executor.counts)


def timeouts(llm: LLM) -> set[float | None]:
    """The seconds that these calls may take."""
    return _core(llm).model_executor.timeouts


class Later(Policy):
    """Drafts nothing the first `times` that lengths are chosen, then k tokens for every request.

    `ragged`: then up to k tokens, another number for each request of the batch.
    """

    def __init__(self, num_drafts: int, times: int, *, ragged: bool) -> None:
        self.num_drafts, self.times, self.ragged, self.asked = num_drafts, times, ragged, 0

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        self.asked += 1
        if self.asked <= self.times:
            return [0] * len(requests)
        return [
            i % (self.num_drafts + 1) if self.ragged else self.num_drafts
            for i in range(len(requests))
        ]


def draft(
    llm: LLM,
    num_drafts: int,
    *,
    at_once: bool = False,
    ragged: bool = False,
    max_bytes: int = MAX_BYTES,
    after: int = 0,
    idle: int = 0,
) -> None:
    """From now on draft k tokens for every request, also none, and write the drafts down.

    `at_once`: the MTP layer reads every token in its own step, as beside a KV connector.
    `ragged`: requests draft up to k tokens, each another number.
    `max_bytes`: of pending tokens. `after`: lengths were chosen so many times.
    `idle`: steps without drafts before this.
    """
    drafter = _drafter(llm)
    observer = Observer(Later(num_drafts, after, ragged=ragged), drafter.loop.observer.board)
    drafter.loop = replace(
        drafter.loop, observer=observer, must_run=at_once, pending=Pending(max_bytes)
    )
    drafter.loop.idle = idle
    if not hasattr(drafter, "drafts"):
        made, forward = drafter._draft, drafter._forward

        def noting(fed: list[Row], table: Any, drafts: list[list[int]]) -> None:
            made(fed, table, drafts)
            for row in fed:
                if drafts[row.index]:
                    number = int(row.request.split("-")[0])
                    drafter.drafts[number][row.tokens.end] = drafts[row.index]

        def counting(token_ids: Any, *args: Any) -> Any:
            drafter.passes.append(len(token_ids))
            return forward(token_ids, *args)

        drafter._draft, drafter._forward = noting, counting
    drafter.drafts, drafter.passes = defaultdict(dict), []
    drafter.first = llm.request_counter.counter


def asked(llm: LLM) -> int:
    """How often lengths were chosen since `draft`."""
    return _drafter(llm).loop.observer.policy.asked


def drafts(llm: LLM) -> list[dict[int, list[int]]]:
    """What was drafted since `draft` or the last call: of each request, each draft by position."""
    drafter = _drafter(llm)
    found, drafter.drafts = drafter.drafts, defaultdict(dict)
    first, drafter.first = drafter.first, llm.request_counter.counter
    return [found.get(number, {}) for number in range(first, drafter.first)]


def passes(llm: LLM) -> list[int]:
    """Tokens of each pass of the MTP layer since `draft` or the last call."""
    drafter = _drafter(llm)
    found, drafter.passes = drafter.passes, []
    return found


def poison(llm: LLM) -> None:
    """Fill the MTP layer's KV with NaN, but for vLLM's null block, while no request runs."""
    context = _core(llm).vllm_config.compilation_config.static_forward_context
    for layer in _drafter(llm)._draft_attn_layer_names:
        context[layer].kv_cache[1:] = float("nan")


def board(llm: LLM, name: str) -> dict[str, float]:
    """A metric of ours by the value of its label."""
    return _drafter(llm).loop.observer.board.read(name)


def decode_broken(
    llm: LLM, what: str, prompts: list[tuple[int, ...]], row: int, layer: str
) -> None:
    """Decode requests broken-0, broken-1 …, of which one is broken after its third token.

    Its "page" then says that it stands elsewhere, or its "slot" is none.
    """
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True, detokenize=False)
    names = [f"broken-{i}" for i in range(len(prompts))]
    for name, ids in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": list(ids)}, params)
    for _ in range(3):
        engine.step()
    runner = _core(llm).model_executor.driver_worker.worker.model_runner
    groups = [group.layer_names for group in runner.kv_cache_config.kv_cache_groups]
    group = next(i for i, layers in enumerate(groups) if layer in layers)
    slots = runner.input_batch.block_table[group].block_table.np[row]
    if what == "page":
        pool = runner.compilation_config.static_forward_context[layer].pool
        pool.span[int(slots[0])] += 1000
    else:
        slots[0] = 1_000_000
    try:
        engine.step()
    finally:
        engine.abort_request(names)


def stream(
    llm: LLM, pieces: list[tuple[int, ...]], tokens: int, stops: tuple[int, ...] = ()
) -> list[int]:
    """The tokens after each piece of streaming input whose pieces are all there from the start.

    `stops`: tokens that end an answer.
    """
    core, found = llm.llm_engine.engine_core, []
    params = SamplingParams(temperature=0.0, max_tokens=tokens, stop_token_ids=[*stops])
    for number, piece in enumerate([*pieces, (0,)]):  # the last one says that there are no more
        request = llm.llm_engine.input_processor.process_inputs(
            "0-stream",
            {"prompt_token_ids": list(piece)},
            params,
            supported_tasks=("generate",),
            resumable=number < len(pieces),
        )
        core.add_request(request)
    while _core(llm).scheduler.has_requests():
        for output in core.get_output().outputs:
            found += output.new_token_ids
    return found


def interrupted(llm: LLM, prompt: Any, tokens: int, *, reload_from: str = "") -> list[int]:
    """A greedy answer to a prompt that loses all it has computed after two steps.

    `reload_from`: because weights are loaded from this folder, else by a preemption. In both cases
    no embedding of an image is left.
    """
    engine, core = llm.llm_engine, _core(llm)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.add_request("0-interrupted", prompt, params)
    found, step = [], 0
    while engine.has_unfinished_requests():
        if step == 2 and reload_from:
            reload(llm, reload_from)
        elif step == 2:
            assert core.reset_prefix_cache(reset_running_requests=True)
            core.reset_encoder_cache()
        for output in engine.step():
            found = list(output.outputs[0].token_ids)
        step += 1
    assert step > 2
    return found


def beside(
    llm: LLM, first: tuple[int, ...], others: list[tuple[int, ...]], tokens: int, seconds: float
) -> dict[str, Any]:
    """Run a prompt, and once it has tokens others beside it, with a budget of seconds for a step.

    `answers` in this order; `steps`: each request's tokens in each step since then; `longest`: the
    seconds of the longest step, by the engine's metrics.
    """
    engine, scheduler = llm.llm_engine, _core(llm).scheduler
    before, scheduler.pacing.seconds = scheduler.pacing.seconds, seconds
    scheduler.pacing.costs = Costs()
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts, answers = [first, *others], {}
    steps: list[list[int]] = []
    schedule = scheduler.schedule

    def noting(*args: Any) -> Any:
        output = schedule(*args)
        counts = {int(name.split("-")[0]): n for name, n in output.num_scheduled_tokens.items()}
        steps.append([counts.get(i, 0) for i in range(len(prompts))])
        return output

    def add(i: int) -> None:
        own = params.clone()
        own.max_tokens = 4 * tokens if i == 0 else tokens
        engine.add_request(f"{i}-beside", {"prompt_token_ids": list(prompts[i])}, own)

    def step() -> None:
        for output in engine.step():
            answers[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)

    add(0)
    while not answers.get(0):
        step()
    scheduler.schedule = noting
    for i in range(1, len(prompts)):
        add(i)
    while engine.has_unfinished_requests():
        step()
    del scheduler.schedule
    scheduler.pacing.seconds = before
    (longest,) = board(llm, "longest_step_seconds").values()
    return {
        "answers": [answers[i] for i in range(len(prompts))],
        "steps": steps,
        "longest": longest,
    }


def pages(llm: LLM, prompts: list[tuple[int, ...]], tokens: int) -> dict[str, Any]:
    """Run the prompts together and count after each step, by the engine's own block tables.

    `held`: the numbers of state pages that a request held in one linear layer, `running`: the
    requests at once, `in_use`: the blocks of any kind that are held after the last has finished.
    """
    engine, scheduler = llm.llm_engine, _core(llm).scheduler
    manager = scheduler.kv_cache_manager
    linear = [m for m in manager.coordinator.single_type_managers if isinstance(m, MambaManager)]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for i, ids in enumerate(prompts):
        engine.add_request(f"pages-{i}", {"prompt_token_ids": list(ids)}, params)
    held, running = set(), 0
    while engine.has_unfinished_requests():
        engine.step()
        running = max(running, len(scheduler.running))
        for request in scheduler.running:
            for group in linear:
                blocks = group.req_to_blocks[request.request_id]
                held.add(sum(not block.is_null for block in blocks))
    pool = manager.block_pool
    in_use = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # less the null block
    return {"held": held, "running": running, "in_use": in_use}


def backends(llm: LLM) -> set[tuple[str, str]]:
    """Which backend has run which op of ours, for ops that have been loaded."""
    return {(op, backend) for backend, _, op in dispatch._LOADED}


def concurrency(llm: LLM) -> float:
    """Requests of the maximum length that run at once, as vLLM counts them."""
    config = _core(llm).scheduler.kv_cache_config
    return get_max_concurrency_for_kv_cache_config(llm.llm_engine.vllm_config, config)


def pieces(llm: LLM) -> tuple[int, int]:
    """How many graphs were compiled, and into how many pieces they were cut."""
    counts = compilation_counter
    return counts.num_graphs_seen, counts.num_piecewise_graphs_seen


def state_bytes(llm: LLM) -> tuple[int, int]:
    """Bytes of one request in one linear layer: what this engine reserves, and vLLM's own model.

    vLLM's figure is its own spec for the shapes and dtypes of its own model under the same flags.
    """
    config = llm.llm_engine.vllm_config
    groups = _core(llm).scheduler.kv_cache_config.kv_cache_groups
    specs = [g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, MambaSpec)]
    layer = SimpleNamespace(
        get_state_shape=lambda: Qwen3NextForCausalLM.get_mamba_state_shape_from_config(config),
        get_state_dtype=lambda: Qwen3NextForCausalLM.get_mamba_state_dtype_from_config(config),
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        is_kv_cache_tp_replicated=False,
    )
    upstream = replace(MambaBase.get_kv_cache_spec(layer, config), page_size_padded=None)
    return specs[0].max_memory_usage_bytes(config), upstream.max_memory_usage_bytes(config)


def packed(llm: LLM) -> dict[str, set[str]]:
    """Encodings of the weights that our kernels multiply by, of the trunk and of the MTP layer."""
    runner = _core(llm).model_executor.driver_worker.worker.model_runner
    models = {"trunk": runner.model, "MTP": runner.drafter.model.model}
    return {
        name: {module.encoding for module in model.modules() if isinstance(module, Packed)}
        for name, model in models.items()
    }


def faults(llm: LLM) -> int:
    """Page faults of tensors that are taken and freed."""
    return page_faults()


def load_memory(llm: LLM) -> tuple[int, ...]:
    """What load_memory.py, with which a fork began, has measured of the last model."""
    *_, loaded = sys.modules["engines.vllm.load_memory"].found
    return tuple(loaded)


def reload(llm: LLM, folder: str) -> None:
    """Serve the weights of this folder from now on."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
