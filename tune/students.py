"""The students that a sweep compares: five around a search, or the cells of a grid."""

from dataclasses import dataclass, field
from typing import Any

from richkd.errors import ConfigError
from tune.settings import Grid
from tune.study import MAIN
from tune.warmstart import printed

OF_ALL = ("seed", "device", "storage", "cache")  # what cells cannot differ in


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """One of the students that a sweep compares, each trained with several seeds.

    Attributes:
        title: Its row in the table.
        label: How its runs are called, before their seed.
        method: That it is trained by.
        settings: Dotted keys on top of the base config, beneath what a search found.
        search: Whose best setting it runs; None: `settings` alone.
        against: Name of the student that it is compared with.
        params: What distinguishes it from the others, beside what is searched.
    """

    title: str
    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    search: str | None = None
    against: str | None = "kd"
    params: dict[str, str] = field(default_factory=dict)


def of_preset(method: str) -> str:
    """Return what the students of a method's preset are called: of others than RichKD it is no setting of the paper's."""
    return "as printed" if method.startswith("richkd") else "untuned"


def around_a_search(own: str, settings: dict[str, Any]) -> dict[str, Student]:
    """Return the students that a search of the method `own` compares, by name.

    Args:
        own: Method.
        settings: What its trials have on top of the base config.
    """
    return {
        "ce": Student(title="labels only", label="ce", method="ce", settings=printed("ce")),
        "kd": Student(
            title="kd, T 3, weight 3",
            label="kd",
            method="kd",
            settings=printed("kd"),
            against=None,
        ),
        "kd_tuned": Student(
            title="kd, tuned", label="kd-tuned", method="kd", settings=settings, search="kd"
        ),
        "richkd_paper": Student(
            title=f"{own}, {of_preset(own)}",
            label=f"{own}-paper",
            method=own,
            settings=printed(own),
        ),
        MAIN: Student(
            title=f"{own}, as found", label=own, method=own, settings=settings, search=MAIN
        ),
    }


def cells(own: str, grid: Grid) -> dict[str, Student]:
    """Return the students of a grid by name, row by row, each compared with the `kd` of its row.

    Args:
        own: Method of the cells whose settings name none.
        grid: Rows and methods.
    """
    found = {}
    for row, there in grid.rows.items():
        for method, on_top in grid.methods.items():
            settings = there | on_top
            if wrong := [key for key in OF_ALL if key in settings]:
                raise ConfigError(
                    f"sweep.grid: {wrong[0]} is one for all cells but is set by {row} or {method}; set it for the whole sweep."
                )
            found[f"{row}-{method}"] = Student(
                title=f"{row}, {method}",
                label=f"{row}-{method}",
                method=settings.pop("method.name", own),
                settings=settings,
                against=f"{row}-kd" if method != "kd" else None,
                params={"row": row, "method": method},
            )
    return found
