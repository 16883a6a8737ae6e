"""Without this extra vLLM is not given the model on a CPU, where vLLM's own does not run."""

from extras.qwen4_exp.without import check_refused

READING = (
    "from vllm.engine.arg_utils import EngineArgs; "
    "EngineArgs(model=model, skip_tokenizer_init=True).create_engine_config()"
)


def test_the_model_is_refused_by_name(tmp_path):
    check_refused(tmp_path, READING)
