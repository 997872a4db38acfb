"""Writes the page of benchmarks and its plots, from the last measurements on this machine.

Measurements are kept in target/bench, one file for each kind, and the page is written beside them; `publish` writes it to docs/. Plots are SVG, written by
hand: nothing but Python is needed. Never writes who or where the machine is: only what it is made of.
"""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

from stage import ROOT, Broken, say

KEPT = ROOT / "target" / "bench"
DOCS = ROOT / "docs"
PAGE = "benchmarks.md"

HEAD = """# Benchmarks

`make bench`, `make bench-envoy`, `make bench-instructions` and `make bench-scale` measure and write this page to `target/bench`;
`make bench-publish` writes it here. Anybody can repeat them; two processors that nobody else uses are needed.

## What these numbers do not show

- **How fast it is on your machine.** One machine measured itself. What carries over are the ratios between rows of one
  table, which met the same machine in the same minutes; even those depend on how expensive its system calls are.
- **A network.** Everything runs on one machine, so the way between Envoy and the server is shorter than in most places.
- **More than one processor for the server.** It has one at the most.
- **What Envoy itself spends** to ask any server at all, except in the table that says so.
- **A fair fight.** The *yardstick* ([always_allow.rs](../examples/always_allow.rs)) decides nothing: it finds the key in the
  request and says yes. It is no product; it is what an answer costs before any work is done for it, written as most people
  write such a server: tonic, envoy-types, `#[tokio::main]`. *Current-thread* is the same on tokio's runtime of one thread.

Rounds are interleaved (A B C A B C ...). Shown are the median and, in brackets, the least and the most of all rounds. The
request is one that Envoy 1.40 sent (645 bytes). Every answer is looked into: a wrong one fails the run.
"""


def keep(kind, figures):
    """Keeps what was measured, with what it was measured on."""
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = {"figures": figures, "on": machine(), "commit": commit(), "date": f"{datetime.date.today()}"}
    (KEPT / f"{kind}.json").write_text(json.dumps(kept, indent=1))


def publish():
    """Writes the page to docs/. Refuses figures from a machine that was disturbed, and negative ones: they say nothing."""
    for file in KEPT.glob("*.json"):
        figures = json.loads(file.read_text())["figures"]
        for name, value in leaves(figures):
            if name == "disturbed" and value:
                raise Broken(f"{file.name}: the machine was disturbed ({value}): measure again")
            if isinstance(value, int | float) and value < 0:
                raise Broken(f"{file.name}: {name} is negative ({value}): measure again")
    write(DOCS)


def leaves(figures, name=""):
    """Every single value in `figures`, with the name it stands under."""
    if isinstance(figures, dict):
        for name, value in figures.items():
            yield from leaves(value, name)
    elif isinstance(figures, list):
        for value in figures:
            yield from leaves(value, name)
    else:
        yield name, figures


def write(folder=KEPT):
    """Writes the page and its plots into `folder`, from all that is kept."""
    sections = {"checks": checks, "envoy": envoy, "instructions": instructions, "scale": scale}
    text = [HEAD]
    for kind, section in sections.items():
        file = KEPT / f"{kind}.json"
        if file.is_file():
            kept = json.loads(file.read_text())
            text.append(section(kept["figures"], folder))
            text.append(f"Measured {kept['date']} at commit {kept['commit']}, on {kept['on']}.\n")
    if len(text) == 1:
        raise Broken("nothing was measured here yet")
    (folder / PAGE).write_text("\n".join(text))
    say(f"\nwritten: {(folder / PAGE).relative_to(ROOT)}")


# --- sections


def checks(figures, folder):
    ratios = figures["ratios"]
    plot(folder, "checks-per-second.svg", "Checks per second, one core, closed loop", figures["closed"]["rows"], "checks_per_second")
    return "\n".join(
        [
            "## Checks: server on one processor, sender on the other\n",
            f"10 000 keys of 100 trusts, Zipf; default configuration with metrics, lease and Redis. trustgate to yardstick, in "
            f"checks/s: **{spread(ratios['current-thread'], 2)}** on a runtime of one thread, "
            f"**{spread(ratios['as written'], 2)}** as people write it.\n",
            "![Checks per second](checks-per-second.svg)\n",
            title(figures["closed"]),
            table(figures["closed"], CLOSED),
            title(figures["open_30"]),
            table(figures["open_30"], OPEN),
            title(figures["open_70"]),
            table(figures["open_70"], OPEN),
            title(figures["tiers"]),
            table(figures["tiers"], CLOSED),
            f"Idle with these keys in its cache, trustgate uses {figures['idle']['cpu_percent']:.2f} % of a processor and "
            f"{figures['idle']['resident_mb']:.0f} MB of memory; after all of the above, {figures['resident_after_mb']:.0f} MB.\n",
        ]
    )


def envoy(figures, _folder):
    ratios = figures["ratios"]
    cpu = ", ".join(f"**{spread(ratio, 2)}** over {name}" for name, ratio in ratios["cpu"].items())
    return "\n".join(
        [
            "## Through Envoy\n",
            f"A real Envoy with one worker and [envoy/envoy.yaml](../envoy/envoy.yaml), which has a processor for itself; server and "
            f"sender share the other. Requests at an even {thousands(figures['rate'])}/s. "
            f"*Server* is what the server costs beside Envoy for each request, *Envoy* is Envoy's own part. Server CPU of "
            f"trustgate to that of the yardstick over TCP: {cpu}. Added p99 over TCP: **{spread(ratios['added_p99'], 2)}**.\n",
            table(figures["rows"], ENVOY),
            *busy(figures),
        ]
    )


def busy(figures):
    """What must be known of the times where Envoy had hardly any left."""
    most = max(row["envoy_cpu_us"]["median"] for row in figures["rows"]["rows"].values()) * figures["rate"] / 1e6
    if most > BUSY:
        yield f"**Envoy was busy {most:.0%} of the time: times are mostly those of its own queue.**\n"


def instructions(figures, _folder):
    names = {
        "parse": "a view over the message",
        "extract": "key and demands out of it",
        "hash": "key to digest",
        "decide": "record and demands to a decision",
        "encode": "decision to bytes",
        "rest": "look-up, lease, metrics",
        "check": "**the whole check**",
    }
    steps = ["| in process | instructions | nanoseconds |", "|---|---|---|"]
    for step, name in names.items():
        came = figures["steps"][step]
        steps.append(f"| {name} | {thousands(came['instructions'])} | {spread(came['nanos'], 0) if 'nanos' in came else ''} |")
    servers = ["| server | user instructions per check |", "|---|---|"]
    servers += [f"| {name} | {thousands(count)} |" for name, count in figures["servers"].items()]
    return "\n".join(
        [
            "## Instructions\n",
            f"Counted by valgrind: what {thousands(2 * figures['checks'])} checks take more than {thousands(figures['checks'])}. "
            f"trustgate to yardstick (current-thread): **{figures['ratio']:.2f}**. The kernel's part is not in it, and valgrind's "
            "processor has no instructions for SHA-256, so that hashing a key counts for much more than it takes.\n",
            *servers,
            "",
            *steps,
            "",
        ]
    )


def scale(figures, folder):
    churn = figures["churn"]
    columns = ("keys", "database", "bytes per cached key", "resident", "start to ready", "import", "reads to fill the cache")
    sizes = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for came in figures["sizes"].values():
        sizes.append(
            f"| {thousands(came['keys'])} | {came['database']} | {came['bytes_per_key']:.0f} | {came['resident_mb']:.0f} MB | {came['start_ms']:.0f} ms | "
            f"{came['import_seconds']:.1f} s | {thousands(came['fills_per_second'])}/s |"
        )
    plot(folder, "scale.svg", "Checks per second, keys uniformly at random", figures["hits"]["rows"], "checks_per_second")
    return "\n".join(
        [
            "## Many keys\n",
            "Room in the cache for all keys. What is below the table was measured with the embedded database.\n",
            *sizes,
            "",
            title(figures["hits"]),
            f"Most keys to fewest: **{spread(figures['ratio'], 2)}**.\n",
            "![Checks per second by number of keys](scale.svg)\n",
            table(figures["hits"], CLOSED),
            title(figures["beside"]),
            table(figures["beside"], BESIDE),
            f"In process, {thousands(churn['entries'])} values in a full L1, {thousands(churn['rate'])} others a second coming and "
            f"going for {churn['seconds']} s: of {thousands(churn['lookups'])} look-ups the longest took "
            f"**{thousands(churn['longest_us'])}** microseconds; the most that one worked, whatever the host did meanwhile, was "
            f"**{thousands(churn['longest_cpu_us'])}**.\n",
        ]
    )


# --- tables

CLOSED = {"checks/s": ("checks_per_second", 0), "CPU per check": ("cpu_us", 2), "p50": ("p50", 0), "p99": ("p99", 0)}
OPEN = {"CPU per check": ("cpu_us", 2), "p50": ("p50", 0), "p99": ("p99", 0), "p99.9": ("p99.9", 0)}
BESIDE = {"p50": ("p50", 0), "p99": ("p99", 0), "p99.9": ("p99.9", 0), "longest": ("max", 0)}
ENVOY = {
    "server CPU": ("cpu_us", 1),
    "Envoy CPU": ("envoy_cpu_us", 1),
    "p50": ("p50", 0),
    "p99": ("p99", 0),
    "added p99": ("added_p99", 0),
}
BUSY = 0.6


def title(rounds):
    return f"### {rounds['title'][0].upper()}{rounds['title'][1:]}\n"


def table(rounds, columns):
    """A table of a dictionary of rounds; times in microseconds."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, figures in rounds["rows"].items():
        cells = [spread(figures[figure], digits) if figure in figures else "" for figure, digits in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if rounds["disturbed"]:
        lines.append(f"\n**{rounds['disturbed']}.**")
    lines.append(f"\n{rounds['rounds']} rounds of {rounds['seconds']:g} s. Times are in microseconds.\n")
    return "\n".join(lines)


def thousands(number):
    return f"{number:,.0f}".replace(",", " ")


def spread(values, digits):
    if values is None:
        return "-"
    median, least, most = (f"{values[name]:,.{digits}f}".replace(",", " ") for name in ("median", "min", "max"))
    return f"{median} ({least}-{most})"


# --- plots

INK, BAR, GRID = "#24292f", "#4c78a8", "#d0d7de"


def plot(folder, file, caption, rows, figure):
    """Bars with their spread, one below the other."""
    rows = {name: figures[figure] for name, figures in rows.items()}
    most = max(values["max"] for values in rows.values())
    left, width, step = 220, 420, 34
    height = 50 + step * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 110} {height}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="24" font-weight="bold">{caption}</text>',
    ]
    for place, (name, values) in enumerate(rows.items()):
        y = 42 + place * step
        median, least, high = (values[key] / most * width for key in ("median", "min", "max"))
        parts += [
            f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">{name}</text>',
            f'<rect x="{left}" y="{y}" width="{median:.1f}" height="22" fill="{BAR}"/>',
            f'<path d="M{left + least:.1f} {y + 11}H{left + high:.1f}" stroke="{INK}" stroke-width="2"/>',
            f'<text x="{left + high + 8:.1f}" y="{y + 16}">{values["median"]:,.0f}</text>',
        ]
    (folder / file).write_text("\n".join([*parts, "</svg>"]) + "\n")


# --- what it was measured on


def machine():
    """Processors, memory and kernel; no name."""
    model = "an unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = " ".join(line.partition(":")[2].split())
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hypervisor = " (virtual)" if "hypervisor" in Path("/proc/cpuinfo").read_text() else ""
    release = platform.release().split("-")[0]
    return f"{os.cpu_count()} x {model}{hypervisor}, {pages / 2**30:.0f} GiB, Linux {release}"


def commit():
    """The commit that was measured; marked if the tree was not clean, this page aside."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs").stdout.strip()
    named = git("describe", "--always").stdout.strip() or "unknown"
    return f"{named}-dirty" if changed else named
