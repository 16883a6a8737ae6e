"""A random vision-language checkpoint, and what transformers makes of images and videos."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoints import write_checkpoint, write_tokenizer
from examples.qwen3_5_layout import IMAGE_TOKENS, VISION, rewrite
from family import FAMILY
from quantised import round_to_int8
from reference import quietly

PLACE = "<|vision_start|><|image_pad|><|vision_end|>"  # of an image in a text
VIDEO_PLACE = PLACE.replace("image", "video")
TEMPLATE = (  # of a chat, as Qwen's: a message is a text, or a list of parts
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for part in m.content -%}"
    f"{{%- if part.type == 'text' -%}}{{{{- part.text -}}}}"
    f"{{%- elif part.type == 'image' -%}}{{{{- '{PLACE}' -}}}}"
    f"{{%- elif part.type == 'video' -%}}{{{{- '{VIDEO_PLACE}' -}}}}{{%- endif -%}}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SIZES = {
    "patch_size": VISION["patch_size"],
    "temporal_patch_size": VISION["temporal_patch_size"],
    "merge_size": VISION["spatial_merge_size"],
    "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},  # pixels
    "image_mean": [0.5] * 3,  # released files name both; vLLM takes pixels as they are otherwise
    "image_std": [0.5] * 3,
}


def write_vision_checkpoint(folder: Path, *, member: str, rounded: bool = False) -> Path:
    """A wrapped checkpoint of the family with what processors need; returns its folder.

    Args:
        rounded: see `round_to_int8`.
    """
    plain = write_checkpoint(folder / "qwen3-next", **FAMILY[member].changes)
    if rounded:
        round_to_int8(plain)
    write_tokenizer(plain, extra=list(IMAGE_TOKENS.values()))
    out = rewrite(plain, folder / "wrapped", wrapped=True, fused=FAMILY[member].fused)
    processors = {
        "preprocessor": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in processors.items():
        raw = kind | {"processor_class": "Qwen3VLProcessor"} | SIZES
        (out / f"{name}_config.json").write_text(json.dumps(raw))
    settings = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return out


def random_image(width: int, height: int, *, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def random_video(frames: int, width: int, height: int) -> np.ndarray:
    """Two frames a second. Shapes: returns [frames, height, width, 3]"""
    return np.stack([np.asarray(random_image(width, height, seed=i)) for i in range(frames)])


def about(video: np.ndarray) -> dict[str, Any]:
    """A video's metadata, as processors take it."""
    F = len(video)
    return {"fps": 2.0, "duration": F / 2, "total_num_frames": F, "frames_indices": [*range(F)]}


def as_url(image: Image.Image) -> str:
    """The image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class VisionReference:
    """transformers' model of such a checkpoint, fp32 by default."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()

    @quietly()
    def prompt_logprobs(self, text: str, images: list[Image.Image]) -> torch.Tensor:
        """Log-probabilities of the prompt's tokens but the first, an image's tokens included."""
        inputs = self._inputs(text, images)
        with torch.no_grad():
            logprobs = self.model(**inputs).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, inputs["input_ids"][0, 1:, None])[:, 0]

    @quietly()
    def greedy(
        self, text: str, images: list[Image.Image], tokens: int, videos: Sequence[np.ndarray] = ()
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """The greedy answer, and the log-probability of each of its tokens."""
        output = self.model.generate(
            **self._inputs(text, images, videos),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, -tokens:]
        logprobs = torch.cat(output.logits).float().log_softmax(-1)
        return tuple(ids.tolist()), logprobs.gather(1, ids[:, None])[:, 0]

    def _inputs(
        self, text: str, images: list[Image.Image], videos: Sequence[np.ndarray] = ()
    ) -> Any:
        return self.processor(
            text=[text],
            images=images or None,
            videos=[*videos] or None,
            video_metadata=[about(video) for video in videos] or None,
            do_sample_frames=False,
            return_tensors="pt",
        )
