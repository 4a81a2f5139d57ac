"""Zero-shot teachers: open_clip's pipeline, the miniature, and the cache of their features."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from richkd import fusion, zeroshot
from richkd.data import Images, load
from richkd.errors import ConfigError, DataError
from richkd.evaluate import accuracy
from richkd.layers import build, read
from richkd.zeroshot import miniature as miniatures
from richkd.zeroshot import openclip, prompts

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """A small architecture among open_clip's own."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)


@pytest.fixture
def images() -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 40, 48, 3), dtype=np.uint8)
    return Images(pixels=pixels, labels=np.zeros(70, int))


@pytest.fixture
def pictures(images) -> list[Image.Image]:
    return list(images.pictures(0, 70))


def test_features_equal_open_clips_own_pipeline(pictures):
    torch.manual_seed(0)
    network, _, transform = open_clip.create_model_and_transforms("tiny")
    tokenize = open_clip.get_tokenizer("tiny")
    images = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        image = network.eval().encode_image(images, normalize=True)
        text = network.encode_text(tokenize(["a cat", "a dog"]), normalize=True)
    ours = openclip.OpenClip("tiny", None, None, CPU)
    torch.testing.assert_close(ours.encode_images(pictures), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.encode_texts(["a cat", "a dog"]), text, atol=1e-6, rtol=0)
    assert ours.logit_scale == pytest.approx(network.logit_scale.exp().item())


def test_cached_logits_equal_live_ones(images, pictures, tmp_path):
    names, templates = ["cat", "dog", "{}"], prompts.templates("rich4")
    live = openclip.OpenClip("tiny", None, None, CPU)
    image = live.encode_images(pictures)
    text = torch.stack([live.encode_texts(row) for row in prompts.captions(templates, names)])
    expected = fusion.zero_shot_logits(image, text, live.logit_scale, "embedding")
    for _ in range(2):  # computed, then read
        clip = zeroshot.load("tiny", None, device=CPU, root=tmp_path)
        found = fusion.zero_shot_logits(
            zeroshot.image_features(clip, images, tmp_path),
            zeroshot.text_matrix(clip, templates, names, tmp_path),
            clip.logit_scale,
            "embedding",
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_grey_images_are_read_as_rgb(images):
    clip = openclip.OpenClip("tiny", None, None, CPU)
    grey = Images(pixels=images.pixels[..., :1], labels=images.labels)
    rgb = Images(pixels=grey.pixels.repeat(3, 3), labels=images.labels)
    torch.testing.assert_close(
        clip.encode_images(grey.pictures(0, 70)), clip.encode_images(rgb.pictures(0, 70))
    )


def test_building_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    openclip.OpenClip("tiny", None, None, CPU)
    assert torch.equal(torch.rand(3), expected)


def entries(root: Path, kind: str) -> int:
    return len(list((root / kind).glob("*.json")))


def test_cache_entries_differ_with_everything_that_matters(images, tmp_path):
    clip = zeroshot.load("tiny", None, device=CPU, root=tmp_path)
    for model in (clip, zeroshot.ZeroShot("another", lambda: clip.encoder, tmp_path)):
        for rows in (images.pixels, images.pixels[::-1], images.pixels[:69]):
            seen = Images(pixels=rows, labels=np.zeros(len(rows), int))
            zeroshot.image_features(model, seen, tmp_path)
        for templates in (("a {}",), ("a {}", "the {}"), ("the {}", "a {}")):
            for names in (["cat", "dog"], ["dog", "cat"]):
                zeroshot.text_matrix(model, templates, names, tmp_path)
    assert entries(tmp_path, "clip-images") == 6
    assert entries(tmp_path, "clip-texts") == 12
    assert entries(tmp_path, "clip-cards") == 2


def test_the_identity_changes_with_model_tag_and_file(tmp_path):
    file = tmp_path / "weights.pt"
    names = {
        openclip.identity("a", None),
        openclip.identity("b", None),
        openclip.identity("a", "x"),
    }
    for content in (b"1", b"2"):
        file.write_bytes(content)
        names.add(openclip.identity("a", None, str(file)))
        names.add(openclip.identity("a", "x", str(file)))
    assert len(names) == 7


def test_cached_features_are_opened_without_open_clip(images, tmp_path):
    clip = zeroshot.load("tiny", None, device=CPU, root=tmp_path)
    zeroshot.image_features(clip, images, tmp_path)
    zeroshot.text_matrix(clip, ["a {}"], ["cat", "dog"], tmp_path)
    code = f"""
import sys
sys.modules["open_clip"] = None  # an import of it raises
import numpy as np, torch
from pathlib import Path
from richkd import zeroshot
from richkd.data import Images
root = Path({str(tmp_path)!r})
clip = zeroshot.load("tiny", None, device=torch.device("cpu"), root=root)
pixels = np.random.default_rng(0).integers(0, 256, (70, 40, 48, 3), dtype=np.uint8)
zeroshot.image_features(clip, Images(pixels=pixels, labels=np.zeros(70, int)), root)
zeroshot.text_matrix(clip, ["a {{}}"], ["cat", "dog"], root)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("ViT-B-23", None, ["clip.model", "did you mean ViT-B-32"]),
        ("ViT-B-32", "openia", ["clip.pretrained", "did you mean openai"]),
        ("ViT-B-32", "openai", ["QuickGELU", "clip.model=ViT-B-32-quickgelu"]),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", ["QuickGELU", "clip.model=ViT-B-32"]),
        ("tiny", "weights.pt", ["clip.pretrained", "weights.pt", "clip.file"]),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_line(model, pretrained, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        zeroshot.load(model, pretrained, device=CPU, root=tmp_path)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)
    assert not list(tmp_path.glob("clip-cards/*/card.json"))


def test_a_file_of_weights_is_taken_with_the_preprocessing_of_its_tag(
    pictures, tmp_path, monkeypatch
):
    torch.manual_seed(5)
    network = open_clip.create_model("tiny")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    tag = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda model, name: tag if name == "toy" else {}
    )
    plain, own = (
        openclip.OpenClip("tiny", name, str(tmp_path / "weights.pt"), CPU) for name in (None, "toy")
    )
    transform = open_clip.image_transform(
        32, False, tag["mean"], tag["std"], interpolation="bicubic", resize_mode="squash"
    )
    images = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        expected = network.eval().encode_image(images, normalize=True)
    torch.testing.assert_close(own.encode_images(pictures), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(plain.encode_images(pictures), expected, atol=1e-2)


def test_foreign_weights_are_refused_and_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sentinel",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="clip.file=.*could not be loaded"):
        zeroshot.load("tiny", None, str(tmp_path / "evil.pt"), device=CPU, root=tmp_path)
    assert not (tmp_path / "sentinel").exists()


def test_captions_that_do_not_fit_are_counted():
    clip = openclip.OpenClip("tiny", None, None, CPU)
    with pytest.warns(UserWarning, match="1 of 2 captions are longer"):
        clip.encode_texts(["a cat", "very " * 80 + "long"])


@pytest.fixture(scope="module")
def digits():
    data = load(build(read([])).data)
    everything = [
        np.concatenate([getattr(part, what) for part in (data.train, data.test)])
        for what in ("pixels", "labels")
    ]
    return data, Images(pixels=everything[0], labels=everything[1])


def top1(clip, digits, root, name: str) -> float:
    data, images = digits
    logits = fusion.zero_shot_logits(
        zeroshot.image_features(clip, images, root),
        zeroshot.text_matrix(clip, prompts.templates(name), data.names, root),
        clip.logit_scale,
        "embedding",
    )
    return accuracy(logits, torch.from_numpy(images.labels))["top1"]


def test_the_miniature_reads_handwriting_that_it_never_saw(miniature, digits, cache_root):
    assert top1(miniature, digits, cache_root, "digits") > 75


def test_the_bad_prompts_are_bad(miniature, digits, cache_root):
    good = [
        top1(miniature, digits, cache_root, f"digits{end}") for end in ("", "-photo", "-written")
    ]
    assert top1(miniature, digits, cache_root, "digits-bad") < min(good) - 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a blurry photo of a seven", ["does not know blurry", "digits-photo"]),
        ("a photo of a digit seven " + "seven " * 5, ["reads 10 words", "has 11"]),
    ],
)
def test_the_miniature_refuses_what_it_cannot_read(miniature, text, words):
    with pytest.raises(DataError) as caught:
        miniature.encoder.encode_texts([text])
    assert all(word in str(caught.value) for word in words)


def test_case_and_signs_change_nothing_for_the_miniature(miniature):
    encode = miniature.encoder.encode_texts
    assert torch.equal(
        encode(["a photo of the digit seven"]), encode(["A photo of the digit: 'Seven'!"])
    )


def test_rendered_digits_are_a_function_of_the_seed():
    one, other = (miniatures.render(20, np.random.default_rng(0)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert one[2] == other[2]
    assert set(one[0].unique().tolist()) <= {k / 16 for k in range(17)}
