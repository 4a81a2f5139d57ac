"""Where networks look, which test images are shown, and the files that are written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from richkd import __main__ as command_line
from richkd import checkpoint, distill, explain, models
from richkd.command import main
from richkd.errors import ConfigError, CorruptError, Interrupted
from richkd.evaluate.outcomes import happened
from richkd.explain import cam, panels, samples
from richkd.layers import build, dump, read
from richkd.models.network import Network

SIZE = (10, 10)


class Pooled(Network):
    """A convolution, a ReLU, the mean over places, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(5, 4)

    def staged(self, images):
        """Return the mean over places, and the map."""
        x = self.body(images)
        return x.mean((2, 3)), [x]


class Attended(nn.Module):
    """Patches as tokens behind a class token, one layer of attention, the class token classified."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.query, self.rest = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def tokens(self, images):
        """Return the class token and the patches."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)

    def behind(self, x, seen):
        """Return the logits of tokens `x`, given them behind the norm."""
        key, value = self.rest(seen).chunk(2, 2)
        weights = (self.query(seen) @ key.transpose(1, 2)).softmax(2)
        return self.head(self.last(x + weights @ value)[:, 0])

    def forward(self, images):
        """Return logits."""
        x = self.tokens(images)
        return self.behind(x, self.norm(x))


@pytest.fixture
def images():
    """Four noisy images."""
    return torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def scaled(maps):
    """Return each map divided by its maximum, in NumPy."""
    maps = np.maximum(maps, 0)
    highest = maps.max((1, 2), keepdims=True)
    return np.divide(maps, highest, out=np.zeros_like(maps), where=highest > 0)


def test_of_pooled_maps_it_is_the_weights_of_the_class_times_the_maps(images):
    torch.manual_seed(1)
    network, labels = Pooled(), torch.tensor([0, 1, 2, 3])
    found = cam.grad_cam(network, images, labels)
    assert (found.layer.name, found.layer.layout.grid) == ("body", (5, 5))
    with torch.no_grad():
        maps, weights = network.body(images).double().numpy(), network.head.weight.double().numpy()
    own = np.einsum("nc,nchw->nhw", weights[labels.numpy()], maps)
    assert np.allclose(found.maps.numpy(), scaled(own), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(found.logits, network(images), atol=1e-6)
    assert found.maps.max() == 1


def test_of_a_class_token_it_is_the_norm_ahead_of_the_last_attention(images):
    torch.manual_seed(1)
    network, labels = Attended().double(), torch.tensor([3, 0, 2, 1])
    images = images.double()
    found = cam.grad_cam(network, images, labels)
    layout = cam.Layout("tokens", (5, 5), 1)
    assert found.layer == cam.Layer(name="norm", call=0, layout=layout)
    x = network.tokens(images).detach()
    seen = network.norm(x).detach().requires_grad_()
    logits = network.behind(x, seen)
    (slopes,) = torch.autograd.grad(logits[torch.arange(4), labels].sum(), seen)
    weights = slopes[:, 1:].mean(1, keepdim=True).numpy()
    own = (weights * seen.detach()[:, 1:].numpy()).sum(2).reshape(4, 5, 5)
    assert np.allclose(found.maps.numpy(), scaled(own), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "size", "layer", "grid"),
    [
        ("cnn8", (8, 8), "body.5", (4, 4)),  # 2 x 2 places behind it would not show much
        ("resnet8", (32, 32), "layer3", (8, 8)),
        ("resnet8", (32, 48), "layer3", (8, 12)),
        ("vgg8", (32, 32), "block4", (4, 4)),  # with a ReLU behind that overwrites its output
        ("wrn_16_1", (32, 32), "bn1", (8, 8)),
        ("mobilenetv2", (64, 64), "conv2", (4, 4)),
        ("pvt_ti", (64, 64), "stages.2.blocks.1.norm2", (4, 4)),
        ("t2t_vit_7", (64, 64), "blocks.6.norm1", (4, 4)),
        ("deit_ti", (64, 64), "body.blocks.11.norm1", (4, 4)),
        ("timm/test_vit", (160, 160), "body.blocks.5.norm1", (10, 10)),
        ("timm/test_convnext", (64, 64), None, None),
        ("torchvision/resnet18", (96, 96), "body.layer4", (3, 3)),
    ],
)
def test_each_network_is_looked_at_and_left_as_it_was(name, size, layer, grid):
    torch.manual_seed(0)
    network = models.build(name, 5, size=size).train()
    network.head.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(2, 3, *size)
    found = cam.grad_cam(network, images, torch.tensor([1, 4]))
    own = found.layer.layout
    assert found.maps.shape == (2, *own.grid)
    assert layer in (None, found.layer.name) and grid in (None, own.grid)
    assert found.maps.min() >= 0
    assert all(each in (0, 1) for each in found.maps.amax((1, 2)).tolist())
    assert network.training and not network.head.weight.requires_grad and not images.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(each, kind) for each in network.modules() for kind in hooks)


def test_of_several_calls_of_one_module_the_last_is_looked_at(images):
    class Twice(Pooled):
        def staged(self, images):
            """Return the mean over places of the second call, and its map."""
            x = self.body[1](self.body[0](images))
            x = self.body[1](x - x.mean())
            return x.mean((2, 3)), [x]

    torch.manual_seed(1)
    network = Twice()
    layer = cam.find_layer(network.eval(), images[:1].requires_grad_())
    assert (layer.name, layer.call) == ("body.1", 1)
    found = cam.grad_cam(network, images, torch.tensor([0, 1, 2, 3]))
    maps = network.staged(images)[1][0].detach().double().numpy()
    own = np.einsum("nc,nchw->nhw", network.head.weight.detach().double().numpy(), maps)
    assert np.allclose(found.maps.numpy(), scaled(own), atol=1e-5)


def test_a_network_without_places_is_one_line(images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(300, 4))
    with pytest.raises(ConfigError, match="needs a layer with places but Sequential shows none"):
        cam.grad_cam(network, images, torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("shape", "module", "expected"),
    [
        ((1, 7, 4, 4), nn.ReLU(), cam.Layout("maps", (4, 4))),
        ((1, 4, 4, 7), nn.ReLU(), cam.Layout("last", (4, 4))),
        ((1, 17, 7), nn.LayerNorm(7), cam.Layout("tokens", (4, 4), 1)),
        ((1, 16, 7), nn.LayerNorm(7), cam.Layout("tokens", (4, 4), 0)),
        ((1, 2, 7), nn.LayerNorm(7), None),  # a class token and one place
        ((1, 17, 7), nn.Linear(7, 7), None),  # such as queries
        ((1, 7, 1, 1), nn.ReLU(), None),
        ((1, 7, 4, 4), nn.AdaptiveAvgPool2d(4), None),
        ((1, 3, 17, 64), nn.LayerNorm(64), None),  # heads
        ((1, 7), nn.ReLU(), None),
    ],
)
def test_outputs_are_maps_where_they_have_the_shape_of_the_image(shape, module, expected):
    output = torch.randn(shape)
    found = cam.layout_of(module, output, (64, 64))
    assert found == expected
    if found is not None:
        seen = found.to_map(output)
        assert seen.shape == (1, 7, 4, 4)
        assert torch.equal(found.with_map(output, seen), output)


@pytest.fixture
def said():
    """Logits of two teachers, and labels; each is right and wrong in many rows, ties are among them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (300,), generator=generator)
    teacher, fused = torch.randint(6, (2, 300, 8), generator=generator).float()
    fused[torch.arange(300), labels] += 3
    teacher[torch.arange(300), labels] += 1
    return teacher, fused, labels


def test_picked_rows_have_their_outcome_and_are_the_same_for_one_seed(said):
    which = happened(*said)
    found = samples.pick(which, 4, 3)
    for name, rows in found.items():
        assert len(rows) == 4 and rows == sorted(set(rows))
        assert which[name][rows].all()
    assert len(set().union(*found.values())) == 16  # none is shown twice
    assert samples.pick(which, 4, 3) == found
    assert samples.pick(which, 4, 4) != found


def test_of_few_rows_all_are_picked_for_each_of_their_outcomes():
    only = torch.tensor([False, True, False, True])
    which = {"from_outside": only, "repaired": only, "harmed": ~only, "both_wrong": only & ~only}
    assert samples.pick(which, 3, 0) == {
        "from_outside": [1, 3], "repaired": [1, 3], "harmed": [0, 2], "both_wrong": []
    }  # fmt: skip


def test_classes_of_a_sample_are_the_first_of_each_teacher_and_the_true_one():
    shown = {
        "teacher": torch.tensor([[9.0, 8.5, 8.0, 0, 0, 0, 0]]),
        "clip": torch.tensor([[0, 0, 9.0, 8.5, 0, 0, 0]]),
        "fused": torch.tensor([[1.0, 2.0, 9.0, 8.0, 0, 0, 0]]),
    }
    one = samples.sample(0, 6, shown)
    assert one.classes == (2, 3, 1, 0, 6)
    for who, logits in shown.items():
        own = [math.exp(v) for v in logits[0].tolist()]
        assert one.shares[who].tolist() == pytest.approx([v / sum(own) for v in own])
    sure = {who: torch.tensor([[50.0, 0, 0, 0, 0]]) for who in shown}
    assert samples.sample(0, 0, sure).classes == (0, 1, 2, 3)  # as many as fill a picture


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (20, 60, 3), (300, 200, 3)])
def test_images_of_any_size_are_drawn_in_colour_under_a_map(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    large = panels.enlarged(pixels)
    assert large.dtype == np.uint8 and large.shape[2] == 3 and max(large.shape) == panels.SIDE
    dark = panels.overlaid(np.zeros_like(large), torch.zeros(4, 4, dtype=torch.float64))
    assert not dark.any()
    half = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    lit = panels.overlaid(np.zeros_like(large), half)
    assert lit[:, -1].min() > 100 and not lit[:, 0].any()


def run(*words):
    return main("python -m richkd", command_line.ABOUT, command_line.VERBS, ["explain", *words])


@pytest.fixture(scope="module")
def task(cache_root, miniature, tmp_path_factory):
    """A folder with three runs of a few steps: ce, kd and richkd-l, of tiny students and teacher."""
    folder = tmp_path_factory.mktemp("explain")
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 6
    pixels = rng.integers(0, 90, (240, 8, 8, 3), np.uint8)
    for k, label in enumerate(labels):
        pixels[k, label, :, label % 3] += 120
    names = np.array(
        ["cat", "<b>dog</b>", "漢字", "a$b_{c}", "a very long name of a class indeed", "=1+1"]
    )
    np.savez(folder / "data.npz", images=pixels, labels=labels, names=names)
    clip = 2 * np.eye(6)[labels] + rng.normal(0, 1, (240, 6))
    np.save(folder / "clip.npy", clip.astype(np.float32))
    words = [
        *(
            "data.source=arrays",
            f"data.path={folder / 'data.npz'}",
            f"clip.logits={folder / 'clip.npy'}",
        ),
        *(
            "student.name=cnn8",
            "teacher.name=cnn8",
            "teacher.epochs=1",
            "train.epochs=1",
            "device=cpu",
        ),
        *(
            "clip.views=whole",
            f"storage={folder}",
            f"cache={folder / 'cache'}",
            "teacher.views=online",
        ),
    ]
    for name in ("ce", "kd", "richkd-l"):
        config = build(read([*words, f"method.name={name}"]))
        distill.run(config, folder / name)
    (folder / "task.yaml").write_text(dump(config))
    return folder


def test_runs_are_explained_side_by_side(task, capsys):
    words = [str(task / name) for name in ("ce", "kd", "richkd-l")]
    assert run(*words, "--images=10", "--samples=2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    folder = task / "ce" / "explain"
    assert told["folder"] == str(folder) and told["page"] == str(folder / "explain.html")
    assert list(told["layers"]) == ["teacher", "ce", "kd", "richkd-l"]
    kept = json.loads((folder / "explain.json").read_text())
    assert kept == {key: value for key, value in told.items() if key not in ("folder", "page")}
    # what is said is what the student itself says of those rows
    config = explain.config_of(task / "richkd-l" / "best")
    opened = distill.open_task(config)
    student = explain.student_of(task / "richkd-l" / "best", opened)
    rows = torch.tensor(told["rows"])
    with torch.no_grad():
        shares = student.network(student.images(rows)).double().softmax(1)
    names = opened.dataset.names
    for k, each in enumerate(told["networks"]["richkd-l"]):
        assert each["class"] == names[shares[k].argmax()]
        assert each["probability"] == pytest.approx(shares[k].max().item(), abs=1e-6)
        assert each["right"] == (each["class"] == told["labels"][k])
    for name in ("grad-cam", *(name for name, each in told["samples"].items() if each["shown"])):
        with Image.open(folder / f"{name}.png") as drawn:
            assert drawn.size[0] > 600
        assert len((folder / f"{name}.svg").read_bytes()) < 1_000_000
        assert (folder / f"{name}.csv").read_text().count("\n") > 6
    page = (folder / "explain.html").read_text()
    assert "<b>dog" not in page and "漢字" in (folder / "grad-cam.csv").read_text()
    # and they have the outcome under which they are listed
    teacher = distill.open_teacher(config, opened)
    shown = teacher.shown("test")
    for name, each in told["samples"].items():
        for one in each["shown"]:
            right = {
                who: names[logits[one["row"]].argmax()] == one["label"]
                for who, logits in shown.items()
            }
            assert right["fused"] == (name in ("from_outside", "repaired"))
            assert right["teacher"] == (name == "harmed")
    assert any(each["shown"] for each in told["samples"].values())


def test_one_seed_shows_the_same_images(task):
    config = build(read([str(task / "task.yaml")]))
    one, other = (explain.look({}, config, images=3, shown=1) for _ in range(2))
    assert one.found == other.found
    assert [each.png for each in one.pictures] == [each.png for each in other.pictures]
    assert list(one.found["layers"]) == ["teacher"]
    seed = build(read([str(task / "task.yaml"), "seed=1"]))
    assert explain.look({}, seed, images=3, shown=1).found["rows"] != one.found["rows"]


def test_without_clip_samples_are_left_out_and_it_is_said(task, tmp_path, capsys):
    assert run(str(task / "kd"), f"--to={tmp_path}", "--images=1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == {} and list(told["layers"]) == ["teacher", "kd"]
    assert (
        "kd does not listen to both a task teacher and CLIP"
        in (tmp_path / "explain.md").read_text()
    )
    assert {path.stem for path in tmp_path.iterdir()} == {"explain", "grad-cam", "pictures"}


def test_given_logits_have_no_network_to_look_at(task, tmp_path, capsys):
    words = [str(task / "task.yaml"), "teacher.views=auto"]
    words += [f"teacher.logits={task / 'clip.npy'}", f"--to={tmp_path}"]
    assert run(*words, "--samples=1") == 0
    told = capsys.readouterr().out
    assert "was given as logits, so that there is no network of it" in told
    assert not (tmp_path / "grad-cam.png").exists() and (tmp_path / "both_wrong.png").exists()


def test_layers_beside_runs_bring_their_own_teachers(task, tmp_path, capsys):
    words = [str(task / "ce"), str(task / "task.yaml"), "fusion.alpha=0.2", f"--to={tmp_path}"]
    assert run(*words, "--images=1", "--samples=1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["layers"]) == ["teacher", "ce"] and "alpha 0.2" in told["fusion"]


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["nowhere"], "explain takes runs, sweeps, checkpoints and layers but nowhere is none", 2),
        (["RUN/ce", "fusion.alpha=0.2"], "of runs only where things lie can be said", 2),
        (["RUN/ce", "--images=0"], "--images must be a whole number, 1 to 16, but got '0'", 2),
        (["RUN/ce", "--samples=17"], "--samples must be a whole number, 1 to 16", 2),
        (
            ["data.source=digits", "method.name=ce"],
            "explain needs runs, or a config with a teacher",
            2,
        ),
        (["RUN/ce", "--to=RUN/data.npz"], "is no folder", 2),
        (["RUN/ce", "data.source=digits"], "of runs only where things lie can be said", 2),
        (["RUN/ce", "conf/digits.yaml", "--to=RUN/x"], "was made with other images or classes", 2),
    ],
)
def test_bad_words_are_one_line(task, capsys, words, said, code):
    words = [word.replace("RUN", str(task)) for word in words]
    assert run(*words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_damaged_checkpoint_is_one_line(task, tmp_path, capsys):
    saved = checkpoint.load(task / "ce" / "best")
    checkpoint.save(tmp_path / "copy", saved.weights, {}, saved.meta)
    with open(tmp_path / "copy" / "weights.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert run(str(tmp_path / "copy"), f"--to={tmp_path / 'out'}") == CorruptError.exit_code
    assert "is damaged" in capsys.readouterr().err.splitlines()[-1]


def test_a_sweep_stands_for_its_best_and_plain_refits_of_the_same_seed(task, tmp_path):
    for name, run_of in (
        ("ce-seed1", "ce"),
        ("kd-seed1", "kd"),
        ("kd-seed0", "kd"),
        ("richkd-l-seed1", "richkd-l"),
    ):
        target = tmp_path / "sweep" / "refits" / name
        saved = checkpoint.load(task / run_of / "best")
        checkpoint.save(target / "best", saved.weights, {}, saved.meta)
    best = {"best": {"checkpoint": "refits/richkd-l-seed1/best"}}
    (tmp_path / "sweep" / "summary.json").write_text(json.dumps(best))
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    sweep = tmp_path / "sweep"
    found = explain.students_of([sweep])
    assert {name: path.parent.name for name, path in found.items()} == {
        "ce": "ce-seed1", "kd": "kd-seed1", "richkd-l": "richkd-l-seed1"
    }  # fmt: skip
    assert explain.folder_of(sweep) == sweep / "explain"
    assert explain.folder_of(task / "kd" / "best") == task / "kd" / "explain"
    assert explain.folder_of(found["kd"]) == Path("best-explain")  # a copy, without its run
    twice = explain.students_of([task / "kd", sweep])
    assert list(twice) == ["kd kd", "ce", "kd kd-seed1", "richkd-l"]
    assert all(isinstance(path, Path) for path in twice.values())


def test_a_signal_ends_an_explanation_and_nothing_is_written(task, tmp_path):
    seen: list[str] = []

    def progress(what, done, total):
        seen.append(what)

    def stop():
        return 2 if "maps" in seen else None

    config = explain.config_of(task / "richkd-l" / "best")
    with pytest.raises(Interrupted):
        explain.explain(
            {"richkd-l": task / "richkd-l" / "best"},
            config,
            tmp_path / "out",
            stop=stop,
            progress=progress,
        )
    assert not (tmp_path / "out").exists()


def test_teachers_that_a_run_had_and_are_no_more_are_said_so(task, tmp_path, monkeypatch, capsys):
    record = task / "richkd-l" / "run.json"
    before = record.read_bytes()
    known = json.loads(before)
    known["teachers"]["clip"] = "another"
    try:
        record.write_text(json.dumps(known))
        assert run(str(task / "richkd-l"), f"--to={tmp_path}", "--images=1", "--samples=1") == 0
    finally:
        record.write_bytes(before)
    assert "The clip that richkd-l had is another one." in capsys.readouterr().out
