"""What a measurement found, as lines of at most 80 characters."""

import textwrap
from typing import Any

WIDTH = 80
PAPER = {  # Table 12 of the supplement: seconds an epoch of CIFAR-100 and memory, its G taken as GiB, GPU not named
    "kd": (7, 2.278),
    "richkd-l+live": (41, 3.048),
    "crd": (26, 3.226),
    "richkd-f+live": (45, 4.136),
    "richkd-lf+live": (46, 4.138),
}


def number(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def size(count: float) -> str:
    """Return bytes in MiB."""
    return number(count / 2**20)


def head(found: dict[str, Any]) -> list[str]:
    """Return the lines that say what was measured, and on what."""
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    height, width = found["size"]
    rates, versions = found["rates"], found["versions"]
    limits = [
        f"{rates['fp32'] / 1e9:.0f} GFLOP/s in fp32",
        f"{rates['bf16'] / 1e9:.0f} in bf16",
        f"{rates['copy'] / 1e9:.0f} GB/s copied",
    ]
    if found["device"] == "cuda":
        limits.insert(1, f"{rates['tf32'] / 1e9:.0f} in tf32")
        limits.append(f"{rates['launches'] / 1e6:.2f} million launches/s")
    lines = [
        f"training on {found['device']} ({found['device_name']}), {threads} of {found['cores']} cores, "
        + ", ".join(f"{name} {text}" for name, text in versions.items()),
        f"measured: {', '.join(limits)}",
        f"{found['student']} from {found['teacher']} and {found['clip']}, {found['data']} {height} x {width}, "
        f"batch {found['batch_size']}, {found['rounds']} rounds",
    ]
    return [part for line in lines for part in textwrap.wrap(line, WIDTH)]


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines that show what `measure` returned."""
    lines = [
        *head(found),
        "",
        f"{'variant':<25}{'images/s':>9}{'quartiles':>14}{'ratio':>7}{'MiB':>7}{'at most':>9}{'bound':>9}",
    ]
    for name, own in found["variants"].items():
        spread, most = f"{number(own['low'])}-{number(own['high'])}", own["floor"]
        lines.append(
            f"{name:<25}{number(own['images_per_second']):>9}{spread:>14}{own['ratio']:>6.2f}x{size(own['memory']):>7}"
            f"{number(most['images_per_second']):>9}{most['binds']:>9}"
        )
    lines += [
        "medians over the rounds; ratio: to the reference of the same round; at most:",
        "what this machine's arithmetic, memory or launches allow, and which binds",
        "",
    ]
    full = " (tables full)" * any("+table" in name for name in found["variants"])
    lines.append(f"of both in the same rounds{full}; parts alone:")
    for name, middle in found["ratios"].items():
        lines.append(f"{name:<25}{middle:>9.3f}x  +- {found['errors'][name]:.3f}")
    for name, own in found["parts"].items():
        lines.append(f"{name:<25}{number(own['images_per_second']):>9} images/s")
    return lines + computed(found["computed"])


def computed(own: dict[str, Any]) -> list[str]:
    """Return the lines that show what was computed from the rates."""
    if not own:
        return []
    seconds = own["seconds_per_epoch"]
    text = (
        f"computed, not measured: {own['epochs']} epochs of {own['variant']} that fill the table as they go ask for "
        f"{own['fills']:.0f} of {own['views']} views of an image. A first run is {own['first_run']:.2f}x as fast as the "
        f"reference ({number(seconds['first_run'])} s an epoch), a trial of ten that share the table "
        f"{own['sweep_of_10']:.2f}x ({number(seconds['sweep_of_10'])} s)."
    )
    return ["", *textwrap.wrap(text, WIDTH)]


def table12(found: dict[str, Any]) -> list[str]:
    """Return the lines that lay the measured variants beside Table 12 of the paper's supplement."""
    lines = [
        "",
        "as Table 12 of the supplement (CIFAR-100, resnet32x4 to resnet8x4, a GPU)",
        f"{'variant':<25}{'s/epoch':>10}{'GiB':>10}{'paper: s/epoch':>18}{'G':>8}",
    ]
    for name, own in found["variants"].items():
        seconds, memory = own["seconds_per_epoch"], own["memory"] / 2**30
        paper = "{:>18}{:>8}".format(*PAPER[name]) if name in PAPER else ""
        lines.append(f"{name:<25}{number(seconds):>10}{memory:>10.4g}{paper}")
    return lines
