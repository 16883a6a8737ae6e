"""Without this extra SGLang is not given the model on a CPU, where SGLang's own does not run."""

from extras.qwen4_exp.without import check_refused

READING = (
    "from sglang.srt.plugins import load_plugins; load_plugins(); "
    "from sglang.srt.server_args import ServerArgs; ServerArgs(model_path=model).resolve_once()"
)


def test_the_model_is_refused_by_name(tmp_path):
    check_refused(tmp_path, READING)
