"""Limits on one request of a server's client; beyond them a 400 names the field."""

from collections.abc import Awaitable, Callable
from typing import Any

from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.extras.host_fixes.logprobs import MOST, answer_tokens

MAX_STRINGS = 32  # as SGLang's stop strings; each is looked for at every token
ASKED = "qwen3next_asked_logprobs"  # in a prompt: log-probabilities of its request's earlier ones


@patch(
    When.IN_SERVER,
    "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion.render_completion_request",
    "vllm.entrypoints.openai.chat_completion.batch_serving.OpenAIServingChatBatch"
    ".render_batch_chat_request",
    reason="`check_params` sees one prompt, and a request may have a thousand",
    remove_when="`check_params` is removed",
)
async def mark_prompts(host: Callable[..., Awaitable[Any]], serving: Any, request: Any) -> Any:
    """Around the rendering of a request's prompts: all get one list of what they ask for.

    Not a ContextVar: vLLM answers a stream in another task than it renders the prompts in.
    """
    rendered = await host(serving, request)
    prompts = rendered[-1] if isinstance(rendered, tuple) else rendered
    if isinstance(prompts, list) and not getattr(request, "use_beam_search", False):  # no error
        asked: list[int] = []
        for prompt in prompts:
            prompt[ASKED] = asked
    return rendered


@patch(
    When.CONFIGURED,
    "vllm.v1.engine.async_llm.AsyncLLM.add_request",
    reason="one request may ask for log-probabilities that fill the memory, or, but for "
    "OpenAI's API, for 100,000 stop strings, each of which is looked for at every token",
    remove_when="vLLM limits both",
    upstream="https://github.com/vllm-project/vllm/pull/54721",
)
def check_params(
    host: Callable[..., Awaitable[Any]],
    engine: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **more: Any,
) -> Awaitable[Any]:
    """Wrap `AsyncLLM.add_request`, which a server calls for each prompt.

    Raises:
        VLLMValidationError: names the field and what is allowed.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    if isinstance(params, SamplingParams):
        try:
            check_strings(params)
            if isinstance(prompt, dict):
                asked = prompt.pop(ASKED, [])
                params = with_bounded_logprobs(params, _length(prompt), engine.model_config, asked)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
    return host(engine, request_id, prompt, params, *args, **more)


def check_strings(params: Any) -> None:
    """Check the number of strings that are looked for at every token.

    The limit of stop strings in OpenAI's API is a variable of vLLM's (VLLM_MAX_STOP_STRINGS).
    """
    from vllm import envs

    most = max(MAX_STRINGS, envs.VLLM_MAX_STOP_STRINGS)
    for name in ("stop", "bad_words"):
        if len(strings := getattr(params, name) or ()) > most:
            raise ValueError(f"{name} has {len(strings)} strings; allowed are at most {most}")


def with_bounded_logprobs(params: Any, length: int, model_config: Any, asked: list[int]) -> Any:
    """The parameters, max_tokens lowered to what may be asked; this is added to `asked`."""
    of_prompt = length * _entries(params.prompt_logprobs, model_config)
    each = _entries(params.num_logprobs, model_config)
    room = max(1, model_config.max_model_len - length)
    tokens = room if params.max_tokens is None else params.max_tokens
    may = answer_tokens(
        "logprobs (top_logprobs) or prompt_logprobs",
        prompt=of_prompt,
        each=each,
        n=params.n,
        tokens=tokens,
        room=room,
        most=MOST - sum(asked),
    )
    asked.append(params.n * (of_prompt + each * may))
    if may < tokens:
        params = params.clone()
        params.max_tokens = may
    return params


def _entries(asked: int | None, model_config: Any) -> int:
    """The log-probabilities of one token: its own, and those of the likeliest."""
    if asked is None:
        return 0
    return 1 + (model_config.get_vocab_size() if asked == -1 else asked)


def _length(prompt: dict[str, Any]) -> int:
    """The tokens of a prompt as vLLM's renderer gives it."""
    ids = prompt.get("prompt_token_ids")
    embeds = prompt.get("prompt_embeds")
    return len(ids if ids is not None else embeds if embeds is not None else ())
