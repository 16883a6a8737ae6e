"""Checkpoints with one damaged file: every engine refuses them by the file's name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import write_checkpoint
from damage import header_of, write_file

INDEX = "model.safetensors.index.json"
HEADER = "model.safetensors"
NAME = "model.norm.weight"


class Damaged(NamedTuple):
    """A file, what it holds (with `changes`: what of it is changed), and the error about it."""

    file: str
    message: str
    holds: Any = None
    changes: Mapping[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        """Write the checkpoint; returns its folder."""
        path = write_checkpoint(folder, num_hidden_layers=4) / self.file
        if self.file == HEADER:
            header, size = header_of(path)
            write_file(path, self._of(header), size)
        else:
            held = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(self._of(held)))
        return folder

    def _of(self, whole: dict[str, Any]) -> Any:
        return self.holds if self.changes is None else whole | self.changes


def _entry(**changes: Any) -> dict[str, Any]:
    return {NAME: {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]} | changes}


CONFIG, WRONG = "config.json", r"model\.safetensors has \d+ bytes and its header cannot be used"
# Of which every engine reads the file before, or through, the plugin.
FILES: Mapping[str, Damaged] = {
    "a header that is a list": Damaged(HEADER, WRONG, holds=[]),
    "an entry that is a number": Damaged(HEADER, WRONG, changes={NAME: 3}),
    "offsets that are text": Damaged(HEADER, WRONG, changes=_entry(data_offsets=["0", "256"])),
    "offsets that overlap": Damaged(HEADER, WRONG, changes=_entry()),
    "an index that is a list": Damaged(INDEX, rf"{INDEX} holds a list, not an object", holds=[]),
    "an index without weight_map": Damaged(INDEX, "weight_map = None: must name", holds={}),
    "an index that leads outside": Damaged(
        INDEX, "must be a file of the same folder", holds={"weight_map": {NAME: f"../{HEADER}"}}
    ),
    "a generation config that is a list": Damaged(
        "generation_config.json", r"generation_config\.json holds a list", holds=[]
    ),
}
CONFIGS: Mapping[str, Damaged] = {
    "a config that is a list": Damaged(CONFIG, r"config\.json holds a list", holds=[]),
    "a size that is text": Damaged(
        CONFIG, r"config\.json: hidden_size = '64': must be a whole", changes={"hidden_size": "64"}
    ),
    "too many layers to list": Damaged(
        CONFIG,
        r"config\.json: num_hidden_layers = 1000000000000: must be at most 1000",
        changes={"num_hidden_layers": 10**12},
    ),
    "two MTP layers": Damaged(
        CONFIG,
        r"config\.json: num_nextn_predict_layers = 2: .* one MTP layer",
        changes={"num_nextn_predict_layers": 2},
    ),
    "a quantisation that is a list": Damaged(
        CONFIG,
        r"config\.json: quantization_config = \['fp8'\]: must be an object",
        changes={"quantization_config": ["fp8"]},
    ),
    "a dtype that nobody knows": Damaged(
        CONFIG, r"config\.json: \w+ cannot read it \(.*float7", changes={"torch_dtype": "float7"}
    ),
}
