"""Types and ranges of a request's fields: a ValueError says which are allowed."""

from functools import cache
from numbers import Real
from reprlib import repr as shortened
from typing import Any

import msgspec

# Fields that SGLang uses with another type than it declares.
TYPES: dict[str, Any] = {
    "stop_token_ids": set[int | None] | None,
    "logit_bias": dict[str | int, float] | None,
}
# Not checked by type: made by SGLang itself, or checked elsewhere.
UNTYPED = frozenset(
    (
        *("input_text", "input_ids", "input_embeds", "mm_inputs", "num_items_assigned"),
        *("sampling_params", "session_params", "positional_embed_overrides", "kv_hints"),
        *("time_stats", "custom_params", "watermark"),
    )
)


def check_types(field: str, values: Any, kind: type[msgspec.Struct]) -> None:
    """Compare the fields of one of SGLang's structs with their declared types."""
    if not isinstance(values, dict):
        raise ValueError(f"{field} is {shortened(values)}; allowed is an object with fields")
    types = _types(kind)
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{field} has no field {name!r}; allowed are {', '.join(types)}")
        if value is not None and name not in UNTYPED:
            check_type(f"{field}.{name}" if field else name, value, types[name])


@cache
def _types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {each.name: TYPES.get(each.name, each.type) for each in msgspec.structs.fields(kind)}


def check_type(field: str, value: Any, kind: Any) -> None:
    """Check without conversion, so that neither `"1"` nor True is an integer; NumPy's 1 is."""
    from sglang.srt.utils.msgpack_utils import enc_hook

    try:
        msgspec.convert(msgspec.to_builtins(value, enc_hook=enc_hook), kind)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"{field} is {shortened(value)}: {error}") from None


def check_range(field: str, value: float | None, low: float, high: float) -> None:
    """Refuse NaN, and values that are not numbers."""
    if value is not None and not (isinstance(value, Real) and low <= value <= high):
        raise ValueError(f"{field} is {value}; allowed are {low} to {high}")
