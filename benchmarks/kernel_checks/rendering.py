"""The estimates for readers, in Markdown."""

from .devices import DEVICES
from .table import UPDATE

SHOWN = "Qwen3-30B-A3B"  # the layer whose launches are rendered
HEAD = f"""# Estimated times of a layer of experts

Estimates, not measurements: `{UPDATE}` compiles the shipped kernels and needs no GPU.
Milliseconds in bf16 (fp8: weights in fp8, in blocks of 128 x 128) at 8192 tokens (decode: at 1 to 64) with uniform
routing, and in brackets how many times the roofline's floor. Everything that is assumed is in `kernel_estimates.json`.
"""
COLUMNS = "kernel | tile | matrix | registers | programs | loop | GFLOP | HBM GB | L2 GB | ms | bound by | in"


def steps_markdown(steps: list[dict]) -> str:
    """The times of every step by device, and how many times its floor each is."""
    modes = list(dict.fromkeys(row["mode"] for row in steps))
    lines = [HEAD]
    for device in dict.fromkeys(row["device"] for row in steps):
        of_device = [row for row in steps if row["device"] == device]
        lines += [f"## {device}", "", f"Rates: {DEVICES[device].source}.", ""]
        lines += [f"| layer | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
        for layer in dict.fromkeys(row["layer"] for row in of_device):
            cells = {row["mode"]: _cell(row) for row in of_device if row["layer"] == layer}
            lines.append(f"| {layer} | {' | '.join(cells.get(mode, '') for mode in modes)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    return f"{row['ms']:.3g} ({row['ms'] / row['floor_ms']:.1f})"


def launches_markdown(launches: list[dict]) -> str:
    """The launches of one layer with tiles, by chip: what each compiles to and moves."""
    lines = [f"# Launches of a layer of {SHOWN}", "", "Loop: instructions, of these matrix products and loads.", ""]
    for chip in dict.fromkeys(row["chip"] for row in launches):
        lines += [f"## {chip}", "", f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
        shown = [row for row in launches if row["chip"] == chip and row["layer"] == SHOWN and "programs" in row]
        lines += [f"| {' | '.join(_cells(row))} |" for row in shown] + [""]
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    loop = row["loop"] or {}
    facts = (row["tile"], row["matrix"], row["registers"], row["programs"])
    work = (f"{row[key]:.3g}" for key in ("gflop", "hbm_gb", "l2_gb"))
    ms = ", ".join(f"{device} {value:.3g}" for device, value in row["ms"].items())
    bound = ", ".join(dict.fromkeys(row["bound"].values()))
    parts = ", ".join(str(loop[key]) for key in ("instructions", "matrix", "loads") if key in loop)
    return [f"{row['kernel']} ({row['features']})", *map(str, facts), parts, *work, ms, bound, ", ".join(row["modes"])]
