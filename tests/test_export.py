"""Exported students compute what the student does, in ONNX Runtime and as `torch.export`, and say what they are."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import RepoCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open

from richkd import checkpoint, export, load_student, models
from richkd.__main__ import ABOUT, VERBS, _called
from richkd.card import card
from richkd.command import main
from richkd.data import load
from richkd.errors import ConfigError, CorruptError, Interrupted, RichkdError
from richkd.evaluate import accuracy
from richkd.files import read_json
from richkd.layers import Layers, build, digest, read, to_dict

ROOT = Path(__file__).resolve().parent.parent
TRANSFORMERS = ("deit_ti", "pit_ti", "t2t_vit_7", "pvt_ti")
FILES = {"student.pt2", "student.onnx", "model.safetensors", "config.json", "README.md"}
HOSTILE = ("a|b", "<script>alert(1)</script>", "=1+1", "`x`", "*é*")


def made(folder: Path, name: str, *, size=(32, 32), channels=3, names=HOSTILE, **more) -> Path:
    """Write the checkpoint of a network whose batch norms have seen images."""
    torch.manual_seed(0)
    network = models.build(name, len(names), channels=channels, size=size)
    with torch.no_grad():
        network.head.weight.mul_(10)
        network.train()
        for _ in range(5):
            network(torch.randn(4, channels, *size))
    config = build(Layers().over("", {"student.name": name, "data.source": "folder", **more}))
    meta = {
        "config": to_dict(config),
        "digest": digest(config),
        "names": list(names),
        "channels": channels,
        "size": list(size),
        "mean": [0.4] * channels,
        "std": [0.3] * channels,
        "data": "0" * 64,
        "epoch": 1,
        "metrics": {"val/top1": 50.0, "val/top5": 90.0},
    }
    checkpoint.save(folder, dict(network.state_dict()), {}, meta)
    return folder


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"images": images})[0]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint with hostile class names for pictures that are no squares, and its export."""
    folder = tmp_path_factory.mktemp("shipped")
    hostile = f"{'long ' * 30}\u00a0``` <script> </td> | --- \u00a0```"
    source = made(folder / "student", "cnn8", size=(12, 16), **{"data.path": hostile})
    export.export(source, folder / "out", "a|b <i>")
    return source, folder / "out"


@pytest.mark.parametrize(
    "name",
    [
        *("resnet8x4", "wrn_16_1", "vgg8", "mobilenetv2", "timm/resnet10t"),
        *(
            pytest.param(name, marks=pytest.mark.soak)  # 10 s each
            for name in ("resnet18", "shufflenetv1", "shufflenetv2", *TRANSFORMERS)
        ),
    ],
)
def test_families_compute_the_same_in_both_programs_at_any_batch(tmp_path, name, capfd):
    source = made(tmp_path / "student", name)
    answer = export.export(source, tmp_path / "out", "x")
    assert capfd.readouterr() == ("", "")
    assert {*answer["files"]} == {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert {file: {*found} for file, found in answer["difference"].items()} == {
        file: {"1", "7"} for file in ("student.pt2", "student.onnx")
    }
    student = load_student(source)
    program = torch.export.load(tmp_path / "out" / "student.pt2").module()
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 7, 33):
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        wanted = student(images)
        assert wanted.std() > 1e-3
        torch.testing.assert_close(program(images), wanted, rtol=1e-4, atol=1e-4)
        found = onnx_logits(tmp_path / "out" / "student.onnx", images.numpy())
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


def test_the_checkpoint_of_a_transformer_says_how_large_its_images_are(tmp_path):
    student = load_student(made(tmp_path / "student", "t2t_vit_7", size=(16, 24)))
    assert student(torch.zeros(2, 3, 16, 24, dtype=torch.uint8)).shape == (2, 5)


def test_each_file_says_by_itself_what_goes_in_and_comes_out(shipped):
    source, out = shipped
    config = read_json(out / "config.json")
    assert config["names"] == list(HOSTILE)
    assert config["input"]["shape"] == ["batch", 3, 12, 16]
    assert config["inside"] == {"mean": [0.4] * 3, "std": [0.3] * 3}
    session = onnxruntime.InferenceSession(out / "student.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["config.json"]) == config
    for place, key in ((session.get_inputs(), "input"), (session.get_outputs(), "output")):
        assert [(each.name, each.shape) for each in place] == [
            (config[key]["name"], config[key]["shape"])
        ]
    extra = {"config.json": ""}
    torch.export.load(out / "student.pt2", extra_files=extra)
    assert json.loads(extra["config.json"]) == config
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config.json"]) == config
        weights = {key: file.get_tensor(key) for key in file.keys()}
    network = models.build(config["student"]["name"], len(config["names"]))
    network.load_state_dict(weights)
    assert config["parameters"] == sum(each.numel() for each in network.parameters())
    assert all(torch.equal(weights[k], v) for k, v in checkpoint.load(source).weights.items())


def test_onnx_s_own_checker_finds_nothing(shipped):
    onnx.checker.check_model(shipped[1] / "student.onnx", full_check=True)


def test_programs_name_no_folder_of_this_machine(shipped):
    for path in shipped[1].iterdir():
        content = path.read_bytes()
        for folder in (ROOT, Path(torch.__file__).parent, shipped[0].parent):
            assert os.fsencode(folder) not in content, path


def test_the_example_of_the_card_classifies_as_the_student_does(shipped, tmp_path):
    source, out = shipped
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(256, size=(40, 90, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for path in out.iterdir():
        (tmp_path / path.name).symlink_to(path)
    picture.save(tmp_path / "photo.jpg", exif=exif)
    page = MarkdownIt().parse((out / "README.md").read_text().split("---\n", 2)[2])
    blocks = [token.content for token in page if token.type == "code_block"]
    (example,) = [block for block in blocks if block.startswith("import json")]
    example += "print(json.dumps(logits.tolist()))\n"
    ran = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    student = load_student(source)
    wanted = student(student.read(tmp_path / "photo.jpg"))
    name, logits = ran.stdout.splitlines()
    assert name == student.names[wanted.argmax(1)[0]]
    torch.testing.assert_close(torch.tensor(json.loads(logits)), wanted, rtol=1e-4, atol=1e-4)


def test_the_card_is_read_by_a_hub_and_its_names_are_inert(shipped):
    text = (shipped[1] / "README.md").read_text()
    assert RepoCard(text).data.to_dict()["license"] == "unknown"
    page = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert "<script" not in page
    assert "<i>" not in page
    assert "<td>a|b</td>" in page
    assert "<td>=1+1</td>" in page
    assert "<h1>a|b &lt;i&gt;</h1>" in page
    assert (
        page.count("<pre>") == 3
    )  # the example, the command and the settings, none of them cut in two


def test_a_card_claims_nothing_that_is_not_known(shipped):
    text = (shipped[1] / "README.md").read_text()
    assert "| validation | 50.00 | 90.00 | unknown |" in text
    assert "| test | not measured | not measured | unknown |" in text
    assert "model-index" not in text
    assert "| this student | unknown |" in text
    assert "students of this setting" not in text
    assert "test rows were read" not in text


def test_a_card_tells_an_epoch_s_accuracy_where_it_was_chosen_on_test_rows(shipped, tmp_path):
    source = made(tmp_path / "student", "cnn8", size=(12, 16), selection="paper")
    about = read_json(shipped[1] / "config.json")
    text = card("a", checkpoint.load(source), about, {"student.onnx": {"1": 0.0}})
    assert "| test | 50.00 | 90.00 | unknown |" in text
    assert "| validation |" not in text
    assert "chosen by test rows, which flatters." in text


@pytest.mark.parametrize("what", ["student.pt2", "student.onnx"])
def test_a_program_that_computes_something_else_is_not_written(
    shipped, tmp_path, monkeypatch, what
):
    name = {"student.pt2": "_write_pt2", "student.onnx": "_write_onnx"}[what]
    write = getattr(export, name)

    def wrong(*arguments):
        run = write(*arguments)
        return lambda images: run(images) + 1e-2

    monkeypatch.setattr(export, name, wrong)
    with pytest.raises(RichkdError, match=rf"{what} must compute what the student does") as caught:
        export.export(shipped[0], tmp_path / "out", "x")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_a_student_of_nan_is_not_written(tmp_path):
    source = made(tmp_path / "student", "cnn8", size=(8, 8))
    saved = checkpoint.load(source)
    saved.weights["head.bias"][0] = torch.nan
    checkpoint.save(source, saved.weights, {}, saved.meta)
    with pytest.raises(RichkdError, match="differ by nan"):
        export.export(source, tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_what_is_there_stays_and_what_is_damaged_is_refused(shipped, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export.export(shipped[0], tmp_path / "out", "x")
    source = made(tmp_path / "student", "cnn8", size=(8, 8))
    with open(source / "weights.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(CorruptError, match="is damaged"):
        export.export(source, tmp_path / "other", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "student"}


def test_a_signal_leaves_nothing(shipped, tmp_path):
    with pytest.raises(Interrupted, match="was not written"):
        export.export(shipped[0], tmp_path / "out", "x", lambda: signal.SIGTERM)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported_is_one_line(shipped, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no\nway")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(
        RichkdError, match=r"cnn8 cannot be written as student.pt2 \(ValueError: no way"
    ):
        export.export(shipped[0], tmp_path / "out", "x")
    assert not list(tmp_path.iterdir())


def command(*words: str) -> int:
    return main("python -m richkd", ABOUT, VERBS, [*words])


@pytest.fixture(scope="module")
def best(swept, tmp_path_factory) -> tuple[dict, dict, Path]:
    """The answer of the small sweep, that of its export by the command line, and the folder."""
    folder = tmp_path_factory.mktemp("best")
    sweep = Path(swept[0]["sweep"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("export", sweep.name, f"storage={sweep.parent}") == 0
    return swept[0], read_json(folder / "small-export" / "config.json"), folder / "small-export"


def test_a_sweep_s_best_is_as_accurate_in_onnx_runtime_as_recorded(best):
    answer, config, out = best
    test = load(build(read(["data.source=digits"])).data).test
    logits = onnx_logits(out / "student.onnx", test.pixels.transpose(0, 3, 1, 2))
    found = accuracy(torch.from_numpy(logits), torch.from_numpy(test.labels))["top1"]
    assert found == answer["best"]["recorded"]["test_top1"]
    assert config["names"][0] == "zero"
    card = RepoCard((out / "README.md").read_text())
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == found
    assert f"| test | {found:.2f} |" in card.text
    assert " | 800 |" in card.text


def test_the_card_of_a_refit_tells_all_seeds(best):
    answer, _, out = best
    text, found = (out / "README.md").read_text(), answer["summary"]["richkd"]
    assert f"One of {found['n']} students" in text
    assert f"is {found['mean']:.2f} ± {found['sd']:.2f} %" in text
    assert "This one has the highest validation accuracy." in text
    run = read_json(Path(answer["sweep"]) / answer["best"]["checkpoint"] / ".." / "run.json")
    for identity in (*run["teachers"].values(), run["data"], run["digest"]):
        assert identity in text


def test_the_command_of_the_card_makes_the_same_student(best, cache_root, tmp_path):
    answer, _, out = best
    text = (out / "README.md").read_text()
    (line,) = [line.strip() for line in text.splitlines() if "python -m richkd distill" in line]
    threads, _, *words = shlex.split(line)
    name, _, value = threads.partition("=")
    subprocess.run(
        [sys.executable, *words, f"cache={cache_root}", "--name", "again"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), name: value},
        check=True,
        capture_output=True,
    )
    wanted = checkpoint.load(Path(answer["sweep"]) / answer["best"]["checkpoint"])
    assert checkpoint.load(tmp_path / "runs" / "again" / "best").sha256 == wanted.sha256
    metrics = read_json(tmp_path / "runs" / "again" / "run.json")["metrics"]
    assert metrics["test/top1"] == answer["best"]["recorded"]["test_top1"]


def test_the_command_says_what_it_wrote_and_how_far_it_is_off(
    shipped, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert command("export", str(shipped[0]), "--json") == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert answer["folder"] == "student-export"
    assert (
        answer["files"]["student.onnx"] == (tmp_path / "student-export/student.onnx").stat().st_size
    )
    assert answer["difference"]["student.onnx"]["7"] < 1e-4
    assert "differs from PyTorch by at most" in told.err
    assert command("export", str(shipped[0])) == 2
    assert "student-export exists already; name a new folder with --to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL must be a run, a sweep or a checkpoint but none is given"),
        (["nix"], "got nix: no folder here or in runs/"),
        (["here"], "holds no checkpoint"),
        (["here", "there"], "export takes one model"),
        (["here", "seed=1"], "export takes one model"),
    ],
)
def test_a_wrong_command_line_is_told(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert command("export", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("kd3", "kd3"),
        ("kd3/best", "kd3"),
        ("s", "s"),
        ("s/trials/007/last", "s-trials-007"),
        ("s/trials/007/seed1", "s-trials-007-seed1"),
        ("s/refits/richkd-l-seed3/best", "s-refits-richkd-l-seed3"),
    ],
)
def test_a_student_is_called_as_its_run_with_its_sweep(place, name, tmp_path):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "s").mkdir(exist_ok=True)
    (tmp_path / "s" / "sweep.json").touch()
    assert _called(tmp_path / place) == name
