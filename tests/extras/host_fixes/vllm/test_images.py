"""Names that clients give to their images."""

from types import SimpleNamespace

from qwen3next_plugin.extras.host_fixes.vllm.images import keep_names_apart


def test_a_given_name_is_no_hash_of_another_image():
    given = SimpleNamespace(mm_uuid_items={"image": ["hash of a known image", None]})
    names = {"image": ["hash of a known image", "hash"], "video": ["hash of a video"]}
    assert keep_names_apart(lambda *_: names, given, "", "sha256") == {
        "image": ["given-hash of a known image", "hash"],
        "video": ["hash of a video"],
    }
