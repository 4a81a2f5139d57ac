"""Groups of test rows: by the task teacher, and by how frequent a class is."""

import math

import numpy as np
import pytest
import torch

from richkd import distill
from richkd.errors import ConfigError
from richkd.evaluate import accuracy, accuracy_of, by_frequency, by_teacher
from richkd.layers import build, read


@pytest.fixture
def said() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher that is often right, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (400,), generator=generator)
    logits = torch.randn(400, 6, generator=generator)
    logits[torch.arange(400), labels] += 2
    return logits, labels


@pytest.mark.parametrize("certain", [0.5, 0.9, "q0.2"])
def test_each_row_is_in_the_group_that_a_loop_puts_it_in(said, certain):
    logits, labels = said
    tops = [
        max(math.exp(v) for v in row) / sum(math.exp(v) for v in row) for row in logits.tolist()
    ]
    bound = np.quantile(tops, float(certain[1:])) if isinstance(certain, str) else certain
    found = by_teacher(logits, labels, certain)
    assert (sum(mask.int() for mask in found.values()) == 1).all()
    for k, (row, label) in enumerate(zip(logits, labels, strict=True)):
        group = "wrong" if row.argmax() != label else "right_uncertain"
        if group != "wrong" and tops[k] > bound:
            group = "right_certain"
        assert found[group][k]


def test_a_quantile_leaves_its_share_of_rows_uncertain(said):
    logits, _ = said
    found = by_teacher(logits, logits.argmax(1), "q0.2")  # always right
    assert (found["right_certain"].sum(), found["right_uncertain"].sum()) == (320, 80)


def test_the_constant_of_a_row_changes_no_group(said):
    logits, labels = said
    shifted = logits + 22 * torch.randn(400, 1)
    one, other = by_teacher(logits, labels, 0.5), by_teacher(shifted.double(), labels, 0.5)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accuracy_of_few_rows_is_left_blank(said):
    logits, labels = said
    groups = {"many": torch.arange(400) < 300, "few": torch.arange(400) < 29}
    found = accuracy_of(logits, labels, groups)
    assert found["many/n"] == 300 and found["few/n"] == 29
    assert found["many/top1"] == accuracy(logits[:300], labels[:300])["top1"]
    assert not {"few/top1", "few/top5"} & found.keys()


def test_frequent_classes_are_those_of_more_than_a_hundred_images():
    trained = torch.tensor([101, 100, 20, 19])
    found = by_frequency(torch.arange(4), trained)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in found.items()} == {
        "head": [0],
        "medium": [1, 2],
        "tail": [3],
    }


def test_a_run_tells_its_student_by_what_the_teacher_says(tmp_path):
    words = ["method.name=kd", "student.name=cnn8", "train.epochs=1", "teacher.epochs=3"]
    words += [f"cache={tmp_path / 'cache'}", "evaluate.certain=q0.5"]
    outcome = distill.run(build(read(words)), tmp_path / "run")
    found = distill.test(outcome)
    names = ("right_certain", "right_uncertain", "wrong")
    sizes = {name: found[f"test/{name}/n"] for name in names}
    assert sum(sizes.values()) == 800
    assert sizes["right_certain"] + sizes["right_uncertain"] == 8 * found["teacher/top1"]
    whole = sum(sizes[name] * found[f"test/{name}/top1"] for name in names) / 800
    assert whole == pytest.approx(found["test/top1"])


@pytest.mark.parametrize("value", ["q1.5", "q", "sure", "0.5"])
def test_what_is_no_probability_and_no_quantile_is_refused(value):
    with pytest.raises(ConfigError, match="evaluate.certain must"):
        build(read([f"evaluate.certain='{value}'"]))
