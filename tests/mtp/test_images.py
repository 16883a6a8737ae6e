import torch

from qwen3next_plugin.mtp.images import Axes, mrope_positions


def test_positions_of_an_image_are_its_prompts_and_then_go_on():
    of_prompt = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    positions = torch.cat([torch.arange(3, 8), torch.tensor([9, 10])])
    found = mrope_positions([Axes(of_prompt, -2), None], positions, [5, 2])
    assert found.tolist() == [
        [1, 1, 3, 4, 5, 9, 10],
        [2, 2, 3, 4, 5, 9, 10],
        [1, 2, 3, 4, 5, 9, 10],
    ]
    assert mrope_positions([None, None], positions, [5, 2]) is None
