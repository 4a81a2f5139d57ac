"""Corrupted images, computed and published."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from richkd.errors import CorruptError, DataError
from richkd.evaluate import corruption
from richkd.evaluate.corruption import FAMILIES, GROUPS, SEVERITIES, corrupted

GENERATOR = torch.Generator


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth images with edges: a coarse random grid, enlarged, uint8 `(12, 3, 32, 32)`."""
    coarse = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    fine[:, :, 8:20, 8:20] *= 0.5
    return (255 * fine).round().byte()


def change(images: torch.Tensor, family: str, severity: int) -> float:
    """Mean absolute change of a pixel, grey levels."""
    return (corrupted(images, family, severity).float() - images.float()).abs().mean().item()


def test_the_families_are_those_of_the_benchmark_but_two(images):
    known = {name for group in GROUPS.values() for name in group}
    assert len(known) == 19
    assert known - set(FAMILIES) == {"frost", "spatter"}
    assert set(FAMILIES) < known
    assert len(known - set(corruption.EXTRA)) == 15
    assert set(corruption.computed(images)) == set(FAMILIES)
    assert set(corruption.computed(images[:, :1])) == set(FAMILIES) - {"saturate"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_changes_images_of_any_size_the_same_way_each_time_and_more_so_at_the_end(
    family, images
):
    for some in (images, images[:3, :, ::4, ::4], images[:2, :, :, :20]):
        for severity in (1, 5):
            found = corrupted(some, family, severity)
            assert (found.dtype, found.shape) == (torch.uint8, some.shape)
            assert torch.equal(found, corrupted(some, family, severity))
    if family != "saturate":
        assert corrupted(images[:3, :1, ::4, ::4], family, 3).shape == (3, 1, 8, 8)
    assert 0 < change(images, family, 1) < 60
    # published severities need not change pixels in step: glass is copied twice from 4 on; corners of elastic are moved less
    if family not in ("glass_blur", "elastic_transform", "saturate"):
        assert change(images, family, 5) > change(images, family, 1)


def test_noise_has_the_deviation_and_shares_that_its_severity_names():
    flat = torch.full((200, 3, 32, 32), 128, dtype=torch.uint8)
    x = 128 / 255
    for severity in SEVERITIES:
        levels = {name: family.levels[severity - 1] for name, family in FAMILIES.items()}
        wanted = {
            "gaussian_noise": levels["gaussian_noise"],
            "speckle_noise": x * levels["speckle_noise"],
            "shot_noise": (x / levels["shot_noise"]) ** 0.5,  # of Poisson
        }
        for name, deviation in wanted.items():
            found = corrupted(flat, name, severity).float() / 255
            assert found.std().item() == pytest.approx(deviation, rel=0.02)
            assert found.mean().item() == pytest.approx(x, abs=0.002)
        found = corrupted(flat, "impulse_noise", severity)
        for value in (0, 255):
            share = (found == value).double().mean().item()
            assert share == pytest.approx(levels["impulse_noise"] / 2, rel=0.1)


def test_blurs_keep_the_sum_of_what_lies_inside_and_are_scipys():
    from scipy.ndimage import gaussian_filter

    x = torch.zeros(1, 1, 33, 33)
    x[0, 0, 16, 16] = 1
    ours = corruption.gaussian_blur(x, 1.0, GENERATOR())[0, 0].numpy()
    theirs = gaussian_filter(x[0, 0].numpy(), 33 / 32, mode="nearest", radius=5)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for family in ("defocus_blur", "motion_blur"):
        for level in FAMILIES[family].levels:
            blurred = FAMILIES[family].corrupt(x, level, GENERATOR().manual_seed(0))
            assert blurred.sum().item() == pytest.approx(1, abs=1e-3)
    # a flat image has nothing to blur, wherever its border is
    flat = torch.full((2, 3, 8, 8), 0.4)
    for family in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "glass_blur"):
        found = FAMILIES[family].corrupt(flat, FAMILIES[family].levels[-1], GENERATOR())
        torch.testing.assert_close(found, flat)


def test_motion_goes_along_its_angle():
    x = torch.zeros(2, 1, 32, 32)
    x[:, 0, 16, 16] = 1
    smeared = corruption.moved(x, 6, 2, torch.tensor([0.0, 90.0]))
    assert smeared[0, 0, 16].sum().item() == pytest.approx(1)
    assert smeared[1, 0, :, 16].sum().item() == pytest.approx(1, abs=1e-5)
    assert smeared[0, 0, 16, 16] == smeared.amax()
    assert smeared[0, 0, 16, 17:].sum() == 0  # to one side


def test_glass_copies_neighbours_from_above_and_the_left():
    x = torch.arange(32 * 32).view(1, 1, 32, 32) / 1024
    found = corruption.glass_blur(x, (0.0, 1, 1), GENERATOR().manual_seed(0))
    shift = ((x - found) * 1024).round().long()
    assert set(shift.unique().tolist()) == {0, 1, 32, 33}
    assert shift[0, 0, :2].eq(0).all()
    assert shift[0, 0, 5:].ne(0).any(1).all()


def test_brightness_and_saturation_are_those_of_hsv(images):
    import colorsys

    pixels = images[:2, :, ::8, ::8].float() / 255
    pixels[0, :, 0, 0] = 0.3  # grey, whose hue is 0
    pixels[0, :, 0, 1] = 0
    for family, place in (("brightness", 2), ("saturate", 1)):
        for level in FAMILIES[family].levels:
            found = FAMILIES[family].corrupt(pixels, level, GENERATOR())
            for k, rgb in enumerate(pixels.permute(0, 2, 3, 1).reshape(-1, 3).tolist()):
                hsv = list(colorsys.rgb_to_hsv(*rgb))
                factor, more = level if isinstance(level, tuple) else (1, level)
                hsv[place] = min(max(hsv[place] * factor + more, 0), 1)
                ours = found.permute(0, 2, 3, 1).reshape(-1, 3)[k].tolist()
                assert ours == pytest.approx(colorsys.hsv_to_rgb(*hsv), abs=1e-5)


def test_contrast_shrinks_towards_the_mean_of_each_channel(images):
    x = images.double() / 255
    found = corruption.contrast(x, 0.3, GENERATOR())
    torch.testing.assert_close(found.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(found.std((2, 3)), 0.3 * x.std((2, 3)))


def test_jpeg_is_pillows(images):
    file = io.BytesIO()
    Image.fromarray(images[3].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=58)
    theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(corrupted(images, "jpeg_compression", 3)[3], theirs)


def test_without_a_bend_an_elastic_change_is_affine():
    # of a ramp, what is sampled says where it was sampled
    x = (torch.arange(32.0) / 31).expand(1, 1, 32, 32)
    still = corruption.elastic_transform(x, (0, 0, 0), GENERATOR())
    torch.testing.assert_close(still, x, atol=1e-5, rtol=0)
    bent = corruption.elastic_transform(x, (0, 0, 0.08), GENERATOR().manual_seed(1))
    inside = bent[0, 0, 8:24, 8:24].double()
    # affine: second differences are 0
    assert inside.diff(n=2, dim=0).abs().max() < 1e-4
    assert inside.diff(n=2, dim=1).abs().max() < 1e-4
    assert (bent - x).abs().max() > 0.02


def test_clouds_are_different_in_each_image_and_fill_the_range():
    clouds = corruption.plasma(3, 32, 2.0, GENERATOR().manual_seed(0))
    assert clouds.shape == (3, 1, 32, 32)
    assert clouds.amin((1, 2, 3)).tolist() == [0] * 3
    assert clouds.amax((1, 2, 3)).tolist() == [1] * 3
    assert not torch.equal(clouds[0], clouds[1])
    # slow decay is rough
    rough, smooth = (
        corruption.plasma(8, 32, decay, GENERATOR().manual_seed(0)).diff(dim=3).abs().mean()
        for decay in (1.75, 3.0)
    )
    assert rough > smooth


# published


@pytest.fixture
def arrays(tmp_path):
    """A folder as CIFAR-100-C is, of six images of 4 x 4 whose pixels are 10 times the severity plus the row."""
    labels = np.array([0, 1, 2, 2, 1, 0])
    values = np.add.outer(10 * np.arange(1, 6), np.arange(6)).ravel().astype(np.uint8)
    pixels = np.broadcast_to(values[:, None, None, None], (30, 4, 4, 3))
    for name in ("fog", "gaussian_noise"):
        np.save(tmp_path / f"{name}.npy", pixels)
    np.save(tmp_path / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return tmp_path, labels


def test_published_arrays_are_read_by_severity_and_row(arrays):
    folder, labels = arrays
    found = corruption.published(folder, labels, (4, 4, 3), np.array([1, 5]))
    assert set(found) == {"gaussian_noise", "fog"}
    for made in found.values():
        for severity in SEVERITIES:
            part = made(severity)
            assert part.shape == (2, 3, 4, 4)
            assert part[:, 0, 0, 0].tolist() == [10 * severity + 1, 10 * severity + 5]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("labels", np.zeros(30, np.uint8), "must hold the labels of the 6 test images"),
        ("labels", np.zeros(6, np.uint8), "must hold the labels of the 6 test images"),
        ("fog", np.zeros((6, 4, 4, 3), np.uint8), r"shape \(30, 4, 4, 3\).* got uint8 of \(6,"),
        ("fog", np.zeros((30, 4, 4, 3), np.float32), "but got float32"),
    ],
)
def test_arrays_of_other_images_are_refused(arrays, file, content, told):
    folder, labels = arrays
    np.save(folder / f"{file}.npy", content)
    with pytest.raises(DataError, match=told):
        corruption.published(folder, labels, (4, 4, 3), np.array([0]))


def test_a_folder_without_arrays_or_with_a_torn_or_pickled_one_is_refused(arrays, tmp_path):
    folder, labels = arrays
    (tmp_path / "none").mkdir()
    # of what counts in no mean alone there is none
    for name in ("labels", "fog"):
        other = "saturate" if name == "fog" else name
        (tmp_path / "none" / f"{other}.npy").write_bytes((folder / f"{name}.npy").read_bytes())
    with pytest.raises(DataError, match="such as gaussian_noise.npy but .*none does not"):
        corruption.published(tmp_path / "none", labels, (4, 4, 3), np.array([0]))
    whole = (folder / "fog.npy").read_bytes()
    np.save(folder / "fog.npy", np.array([{}], object), allow_pickle=True)
    for content in ((folder / "fog.npy").read_bytes(), whole[:-100], b""):
        (folder / "fog.npy").write_bytes(content)
        with pytest.raises(CorruptError, match=r"fog.npy is no whole .npy file"):
            corruption.published(folder, labels, (4, 4, 3), np.array([0]))


def test_the_mean_leaves_out_what_networks_are_not_compared_by():
    top1 = {"fog": [50.0] * 5, "snow": [40.0] * 5, "saturate": [0.0] * 5}
    assert corruption.mean_of(top1) == 45
