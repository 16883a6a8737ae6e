"""The coupled sampler alone: what vLLM's plain sampler yields one position after another."""

import inspect
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from qwen3next_plugin.engines.vllm.speculation.sampler import CoupledSampler, drafts_and_rows
from qwen3next_plugin.engines.vllm.speculation.spread import APPLY

V = 61
CPU = torch.device("cpu")
CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=16))


class Request(NamedTuple):
    """One request of a batch, as far as sampling is concerned."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    generator: torch.Generator | None


def make_request(i: int, **params: Any) -> Request:
    generator = torch.Generator().manual_seed(100 + i)
    ids = torch.randint(V, (9,), generator=generator).tolist()
    params = SamplingParams(stop_token_ids=[3, 5], **params)
    return Request(params, ids[:5], ids[5:], generator if params.temperature > 0 else None)


def bad_words(request: Request) -> list[list[int]]:
    """A word of one token, and one that begins where the first step does."""
    return [[7], [*request.output[3:4], 8]]


def metadata_of(requests: list[Request]) -> SamplingMetadata:
    """What vLLM's InputBatch tells the sampler of these requests."""
    params = [request.params for request in requests]
    processors = [kind(CONFIG, CPU, False) for kind in BUILTIN_LOGITS_PROCESSORS]
    added = [(i, r.params, r.prompt, r.output) for i, r in enumerate(requests)]
    for processor in processors:
        processor.update_state(BatchUpdate(len(requests), removed=[], added=added, moved=[]))
    allowed = torch.zeros(len(requests), V, dtype=torch.bool)
    for row, p in zip(allowed, params, strict=True):
        if p.allowed_token_ids:
            row[[i for i in range(V) if i not in p.allowed_token_ids]] = True

    def column(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(p, name)) for p in params])

    return SamplingMetadata(
        temperature=column("temperature"),
        all_greedy=all(p.temperature == 0 for p in params),
        all_random=all(p.temperature > 0 for p in params),
        top_p=column("top_p"),
        top_k=torch.tensor([p.top_k if p.top_k > 0 else V for p in params], dtype=torch.int32),
        generators={i: r.generator for i, r in enumerate(requests) if r.generator},
        max_num_logprobs=2,
        no_penalties=False,
        prompt_token_ids=torch.tensor([request.prompt for request in requests]),
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=[request.output for request in requests],
        spec_token_ids=None,
        allowed_token_ids_mask=allowed,
        bad_words_token_ids={0: bad_words(requests[0])},
        logitsprocs=LogitsProcessors(processors),
    )


def step_of(counts: list[int], drafts: torch.Tensor) -> SpecDecodeMetadata:
    parts = drafts.split([n - 1 for n in counts])
    return SpecDecodeMetadata.make_dummy([part.tolist() for part in parts], CPU)


def one_by_one(
    request: Request, first: bool, logits: torch.Tensor, drafts: list[int]
) -> tuple[list[int], list[torch.Tensor]]:
    """The plain sampler, position after position, until it leaves the drafts."""
    tokens: list[int] = []
    logprobs = []
    for row, draft in zip(logits, [*drafts, None], strict=True):
        metadata = metadata_of([request._replace(output=request.output + tokens)])
        metadata.bad_words_token_ids = {0: bad_words(request)} if first else {}
        output: SamplerOutput = Sampler()(row[None].clone(), metadata)
        tokens.append(int(output.sampled_token_ids))
        logprobs.append(output.logprobs_tensors.logprobs[0])
        if tokens[-1] != draft:
            break
    return tokens, logprobs


PARAMS = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"temperature": 1.0, "frequency_penalty": 1.1, "logit_bias": {4: 3.0, 9: -2.0}},
    {"temperature": 0.0, "min_tokens": 6},
    {"temperature": 1.0, "min_tokens": 5, "allowed_token_ids": [3, 5, 11, 12]},
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "counts",
    [[4] * 8, [1, 3, 2, 5, 1, 4, 2, 3], [1, 1, 1, 1, 1, 1, 1, 2]],
    ids=["even", "ragged", "one-draft"],
)
def test_as_one_position_after_another(counts, seed):
    """Tokens, log-probabilities and generators, whatever the parameters beside it are."""
    noise = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(sum(counts), V, generator=noise)
    requests = [make_request(i, **params) for i, params in enumerate(PARAMS)]
    twins = [make_request(i, **params) for i, params in enumerate(PARAMS)]
    of_request = logits.split(counts)
    drafts = torch.cat([part[:-1].argmax(-1) for part in of_request])  # likely, and some wrong
    drafts[5::7] = -1  # what vLLM pads drafts with
    output = CoupledSampler(Sampler())(
        step_of(counts, drafts), None, logits.clone(), metadata_of(requests)
    )
    width = max(counts)
    assert output.sampled_token_ids.shape == (len(counts), width)
    for i, part in enumerate(drafts.split([n - 1 for n in counts])):
        tokens, logprobs = one_by_one(twins[i], i == 0, of_request[i], part.tolist())
        padded = tokens + [-1] * (width - len(tokens))
        assert output.sampled_token_ids[i].tolist() == padded, PARAMS[i]
        found = output.logprobs_tensors.logprobs[i * width : i * width + len(tokens)]
        assert torch.equal(found, torch.stack(logprobs))
        if generator := requests[i].generator:
            assert torch.equal(generator.get_state(), twins[i].generator.get_state())


def test_the_test_has_drafts_kept_and_dropped():
    counts = [4] * 8
    logits = 2 * torch.randn(32, V, generator=torch.Generator().manual_seed(0))
    drafts = torch.cat([part[:-1].argmax(-1) for part in logits.split(counts)])
    requests = [make_request(i, **params) for i, params in enumerate(PARAMS)]
    output = CoupledSampler(Sampler())(step_of(counts, drafts), None, logits, metadata_of(requests))
    used = (output.sampled_token_ids >= 0).sum(1)
    assert used.min() == 1
    assert used.max() == 4


@pytest.mark.parametrize("seed", range(6))
def test_drafts_and_rows_are_those_that_vllm_finds(seed):
    """Of requests with drafts, without, and with a prompt before the last token."""
    noise = np.random.default_rng(seed)
    drafts = noise.integers(0, 5, 11).astype(np.int32) * (seed > 0)
    scheduled = drafts + 1 + noise.integers(0, 40, 11) * (noise.random(11) < 0.3)
    ends = np.cumsum(scheduled).astype(np.int32)
    input_ids = torch.from_numpy(noise.integers(0, 1000, 600).astype(np.int32))
    runner = SimpleNamespace(
        device=CPU,
        input_ids=SimpleNamespace(gpu=input_ids, np=input_ids.numpy()),
        arange_np=np.arange(600),
        _arange_scratch=np.empty(600, np.int64),
    )
    runner._get_cumsum_and_arange = partial(GPUModelRunner._get_cumsum_and_arange, runner)
    expected = GPUModelRunner._calc_spec_decode_metadata(runner, drafts, ends)
    found = drafts_and_rows(runner)(drafts, ends)
    for name in ("draft_token_ids", "logits_indices"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert found.num_draft_tokens == expected.num_draft_tokens


def test_vllm_parses_what_it_yields():
    logits = torch.full((5, V), -30.0)
    logits[torch.arange(5), torch.tensor([2, 4, 6, 8, 10])] = 30.0
    requests = [make_request(0, temperature=0.0), make_request(1, temperature=1.0)]
    step = step_of([2, 3], torch.tensor([2, 6, 9]))
    output = CoupledSampler(Sampler())(step, None, logits, metadata_of(requests))
    tokens, logprobs = RejectionSampler.parse_output(
        output.sampled_token_ids, V, logprobs_tensors=output.logprobs_tensors
    )
    assert tokens == [[2, 4], [6, 8]]
    assert logprobs.logprob_token_ids[:, 0].tolist() == [2, 4, 6, 8]
    assert logprobs.cu_num_generated_tokens == [0, 2, 4]


def test_every_processor_of_vllms_is_known():
    assert set(BUILTIN_LOGITS_PROCESSORS) == set(APPLY)


START, END = [20], [21, 22]  # of thinking, in tokens


def thinking(
    budgets: list[int | None], prompts: list[list[int]], num_drafts: int
) -> ThinkingBudgetStateHolder:
    """vLLM's holder, as its input batch makes it."""
    config = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=END)
    holder = ThinkingBudgetStateHolder(config, 16, num_drafts, CPU, False)
    params = [SamplingParams(temperature=0.0, thinking_token_budget=b) for b in budgets]
    added = [(i, p, prompts[i], []) for i, p in enumerate(params)]
    holder.sync_batch(BatchUpdate(len(budgets), removed=[], added=added, moved=[]))
    return holder


def think(
    logits: torch.Tensor,
    budgets: list[int | None],
    draft: Callable[[int, list[int]], list[int]] | None = None,
) -> list[list[int]]:
    """Greedy outputs where token t of request i is drawn from logits[i, t]; without `draft` by
    vLLM's plain sampler.
    """
    N, T, _ = logits.shape
    requests = [make_request(i, temperature=0.0)._replace(output=[]) for i in range(N)]
    prompts = [[1, 2, *START, 4], [*START, 3], [1, 2, 3, *START], [5, 6], [7, *START]]
    holder = thinking(budgets, prompts, num_drafts=4 if draft else 0)
    steps = 0
    while min(len(request.output) for request in requests) < T:
        steps += 1
        drafting = draft if steps % 3 else None
        drafts = [drafting(i, r.output) if drafting else [] for i, r in enumerate(requests)]
        rows = [
            logits[i, min(len(r.output) + j, T - 1)]
            for i, r in enumerate(requests)
            for j in range(len(drafts[i]) + 1)
        ]
        metadata = replace(
            metadata_of(requests),
            thinking_budget_state_holder=holder,
            bad_words_token_ids={},
            spec_token_ids=drafts,
        )
        if draft:
            step = SpecDecodeMetadata.make_dummy(drafts, CPU)
            output = CoupledSampler(Sampler())(step, None, torch.stack(rows), metadata)
        else:
            output = Sampler()(torch.stack(rows), metadata)
        for request, tokens in zip(requests, output.sampled_token_ids.tolist(), strict=True):
            request.output.extend(token for token in tokens if token >= 0)
    return [request.output[:T] for request in requests]


def test_thinking_budgets_end_where_they_end_without_drafts():
    """Right drafts, wrong ones, none, and none for anyone, which vLLM's holder takes amiss."""
    budgets = [0, 3, 5, None, 8]
    noise = torch.Generator().manual_seed(3)
    logits = torch.randn(len(budgets), 24, V, generator=noise)
    logits[:, :, [*START, *END, 3, 5]] -= 10.0  # it does not end by itself
    logits[4, 6, END[0]] = logits[4, 7, END[1]] = 30.0  # but once
    alone = think(logits, budgets)
    ends = [output.index(END[0]) if END[0] in output else None for output in alone]
    assert [end is None for end in ends] == [False, False, False, True, False]
    assert ends[0] == 0
    assert all(alone[i][end + 1] == END[1] for i, end in enumerate(ends) if end is not None)
    for seed in range(6):
        rng = random.Random(seed)

        def draft(i: int, output: list[int], rng: random.Random = rng) -> list[int]:
            right = alone[i][len(output) : len(output) + rng.randrange(5)]
            return [token if rng.random() < 0.8 else 30 for token in right]

        assert think(logits, budgets, draft) == alone


@pytest.mark.compat
def test_vllms_rejection_sampler_still_draws_otherwise():
    """When this fails, remove sampler.py: a seed gives the plain sampler's token."""
    current_platform.register_triton_kernel_overrides()  # as vLLM's workers do
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    alike = 0
    for seed in range(20):
        plain, drafting = make_request(seed, temperature=1.0), make_request(seed, temperature=1.0)
        token = Sampler()(logits[:1].clone(), metadata_of([plain])).sampled_token_ids
        step = step_of([2], torch.tensor([int(logits[0].argmin())]))
        rejecting = RejectionSampler(Sampler())
        metadata = replace(metadata_of([drafting]), top_k=None, top_p=None)
        output = rejecting(step, None, logits.clone(), metadata)
        states = (r.generator.get_state() for r in (plain, drafting))
        alike += output.sampled_token_ids[0, 0] == token and torch.equal(*states)
    assert alike < 20


@pytest.mark.compat
def test_vllm_still_refuses_min_p_and_logit_bias_under_speculation():
    """The patch `allow_min_p_and_logit_bias` can be removed when this fails."""
    from vllm.exceptions import VLLMValidationError

    host = inspect.unwrap(SamplingParams._validate_spec_decode)
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={3: 1.0})):
        with pytest.raises(VLLMValidationError):
            host(params, SimpleNamespace())


def test_the_refusal_is_lifted_for_our_model_alone():
    from vllm.exceptions import VLLMValidationError

    from qwen3next_plugin.engines.vllm.patches import When, apply

    apply(When.WITH_DRAFTS)
    apply(When.WITH_DRAFTS)
    patched = SamplingParams._validate_spec_decode
    assert not hasattr(patched.__wrapped__, "__wrapped__")
    params = SamplingParams(min_p=0.1, logit_bias={3: 1.0})
    for name in ("Qwen3NextForCausalLM", "Another"):
        config = SimpleNamespace(target_model_config=SimpleNamespace(architecture=name))
        if name == "Qwen3NextForCausalLM":
            params._validate_spec_decode(config)
        else:
            with pytest.raises(VLLMValidationError):
                params._validate_spec_decode(config)
    assert (params.min_p, params.logit_bias) == (0.1, {3: 1.0})
    params._validate_spec_decode(None)


@pytest.mark.compat
def test_vllm_still_turns_a_cpu_generator_back_by_an_offset():
    """The detour in worker.py can go when this fails."""
    import inspect

    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "gen.set_offset(gen.get_offset()" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError):
        torch.Generator().get_offset()
