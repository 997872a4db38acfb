"""Writes the benchmark page and its plots from the last measurements on this machine.

target/bench contains one file of measurements per benchmark, and the page. `publish` writes the page to docs/. The
module writes the plots as SVG without a library. The page describes the hardware of the machine, not its name or
location.
"""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

from fixture import ROOT, Broken, say

SAVED = ROOT / "target" / "bench"
DOCS = ROOT / "docs"
PAGE = "benchmarks.md"

HEAD = """# Benchmarks

`make bench`, `make bench-envoy`, `make bench-instructions` and `make bench-scale` measure and write this page to
`target/bench`; `make bench-publish` writes it to `docs`. The measurements need two processors that no other program
uses.

## What these numbers do not show

- **The speed on your machine.** All figures are from one machine. Only the ratios between the rows of one table apply
  to other machines, because the rows were measured in the same minutes. Even these ratios depend on the cost of system
  calls.
- **A network.** All programs run on one machine, so the latency between Envoy and the server is lower than in most
  installations.
- **More than one processor for the server.** The server has at most one.
- **The cost of the check in Envoy itself**, except in the table that states it.
- **A fair comparison.** The *yardstick* ([always_allow.rs](../examples/always_allow.rs)) decides nothing: it finds the
  key in the request and allows it. It shows the cost of an answer before any work, in a server that is written in the
  usual way: tonic, envoy-types, `#[tokio::main]`. *Current-thread* is the same server on tokio's single-threaded
  runtime.

Rounds are interleaved (A B C A B C ...). The tables show the median and, in brackets, the minimum and maximum of all
rounds. Envoy 1.40 sent the request that the benchmarks use (645 bytes). The sender checks every answer, and a wrong
answer fails the run.
"""


def save(kind, figures):
    """Saves the measured figures with the machine, the commit and the date."""
    SAVED.mkdir(parents=True, exist_ok=True)
    saved = {"figures": figures, "on": machine(), "commit": commit(), "date": f"{datetime.date.today()}"}
    (SAVED / f"{kind}.json").write_text(json.dumps(saved, indent=1))


def publish():
    """Writes the page to docs/. Refuses negative figures and figures from a disturbed machine, which mean nothing."""
    for file in SAVED.glob("*.json"):
        figures = json.loads(file.read_text())["figures"]
        for name, value in leaves(figures):
            if name == "disturbed" and value:
                raise Broken(f"{file.name}: the machine was disturbed ({value}): measure again")
            if isinstance(value, int | float) and value < 0:
                raise Broken(f"{file.name}: {name} is negative ({value}): measure again")
    write(DOCS)


def leaves(figures, name=""):
    """Yields every single value in `figures` with its name."""
    if isinstance(figures, dict):
        for name, value in figures.items():
            yield from leaves(value, name)
    elif isinstance(figures, list):
        for value in figures:
            yield from leaves(value, name)
    else:
        yield name, figures


def write(folder=SAVED):
    """Writes the page and its plots into `folder`, from all saved measurements."""
    sections = {"checks": checks, "envoy": envoy, "instructions": instructions, "scale": scale}
    text = [HEAD]
    for kind, section in sections.items():
        file = SAVED / f"{kind}.json"
        if file.is_file():
            saved = json.loads(file.read_text())
            text.append(section(saved["figures"], folder))
            text.append(f"Measured {saved['date']} at commit {saved['commit']}, on {saved['on']}.\n")
    if len(text) == 1:
        raise Broken("no measurements: target/bench is empty")
    (folder / PAGE).write_text("\n".join(text))
    say(f"\nwritten: {(folder / PAGE).relative_to(ROOT)}")


# --- sections


def checks(figures, folder):
    ratios = figures["ratios"]
    caption = "Checks per second, one processor, closed loop"
    plot(folder, "checks-per-second.svg", caption, figures["closed"]["rows"], "checks_per_second")
    idle = figures["idle"]
    return "\n".join(
        [
            "## Checks: server on one processor, sender on the other\n",
            f"10 000 keys of 100 trusts with a Zipf distribution; default configuration with metrics, lease and Redis. "
            f"The ratio of trustgate to the yardstick in checks/s is **{spread(ratios['current-thread'], 2)}** for the "
            f"single-threaded runtime and **{spread(ratios['as written'], 2)}** for the default runtime.\n",
            "![Checks per second](checks-per-second.svg)\n",
            title(figures["closed"]),
            table(figures["closed"], CLOSED),
            title(figures["open_30"]),
            table(figures["open_30"], OPEN),
            title(figures["open_70"]),
            table(figures["open_70"], OPEN),
            title(figures["tiers"]),
            table(figures["tiers"], CLOSED),
            f"Without requests and with these keys in its cache, trustgate uses {idle['cpu_percent']:.2f} % of a "
            f"processor and {idle['resident_mb']:.0f} MB of memory. After all these measurements it uses "
            f"{figures['resident_after_mb']:.0f} MB.\n",
        ]
    )


def envoy(figures, _folder):
    ratios = figures["ratios"]
    cpu = ", ".join(f"**{spread(ratio, 2)}** over {name}" for name, ratio in ratios["cpu"].items())
    return "\n".join(
        [
            "## Through Envoy\n",
            f"A real Envoy with one worker and [envoy/envoy.yaml](../envoy/envoy.yaml) has one processor. The server "
            f"and the sender share the other. The sender sends a constant {thousands(figures['rate'])} requests/s. "
            f"*Server CPU* is the processor time of the server per request, *Envoy CPU* that of Envoy. The ratio of "
            f"trustgate's server CPU to that of the yardstick over TCP is {cpu}. The ratio of the added p99 over TCP "
            f"is **{spread(ratios['added_p99'], 2)}**.\n",
            table(figures["rows"], ENVOY),
            *busy(figures),
        ]
    )


def busy(figures):
    """Yields a warning if Envoy was so busy that its own queue determines the latency."""
    most = max(row["envoy_cpu_us"]["median"] for row in figures["rows"]["rows"].values()) * figures["rate"] / 1e6
    if most > BUSY:
        yield f"**Envoy was busy {most:.0%} of the time, so the latency is mostly the time in Envoy's own queue.**\n"


def instructions(figures, _folder):
    names = {
        "parse": "parse the message",
        "extract": "extract the key and the demands",
        "hash": "hash the key",
        "decide": "decide from the record and the demands",
        "encode": "encode the answer",
        "rest": "look-up, lease and metrics",
        "check": "**the whole check**",
    }
    steps = ["| in process | instructions | nanoseconds |", "|---|---|---|"]
    for step, name in names.items():
        result = figures["steps"][step]
        nanos = spread(result["nanos"], 0) if "nanos" in result else ""
        steps.append(f"| {name} | {thousands(result['instructions'])} | {nanos} |")
    servers = ["| server | user instructions per check |", "|---|---|"]
    servers += [f"| {name} | {thousands(count)} |" for name, count in figures["servers"].items()]
    return "\n".join(
        [
            "## Instructions\n",
            f"valgrind counts the instructions of {thousands(2 * figures['checks'])} checks and of "
            f"{thousands(figures['checks'])} checks; the tables show the difference per check. The ratio of trustgate "
            f"to the yardstick (current-thread) is **{figures['ratio']:.2f}**. The count excludes the kernel. "
            "valgrind's processor has no SHA-256 instructions, so the count for hashing a key is much too high.\n",
            *servers,
            "",
            *steps,
            "",
        ]
    )


def scale(figures, folder):
    churn = figures["churn"]
    columns = ("keys", "database", "bytes per cached key", "resident", "start to ready", "import")
    columns += ("reads to fill the cache",)
    sizes = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in figures["sizes"].values():
        sizes.append(
            f"| {thousands(result['keys'])} | {result['database']} | {result['bytes_per_key']:.0f} | "
            f"{result['resident_mb']:.0f} MB | {result['start_ms']:.0f} ms | {result['import_seconds']:.1f} s | "
            f"{thousands(result['fills_per_second'])}/s |"
        )
    caption = "Checks per second, keys uniformly at random"
    plot(folder, "scale.svg", caption, figures["hits"]["rows"], "checks_per_second")
    return "\n".join(
        [
            "## Many keys\n",
            "The cache has room for all keys. The measurements below this table use the embedded database.\n",
            *sizes,
            "",
            title(figures["hits"]),
            f"The ratio of the most keys to the fewest is **{spread(figures['ratio'], 2)}**.\n",
            "![Checks per second by number of keys](scale.svg)\n",
            table(figures["hits"], CLOSED),
            title(figures["beside"]),
            table(figures["beside"], OTHER_LOAD),
            f"In process, with {thousands(churn['entries'])} entries in a full L1 and {thousands(churn['rate'])} "
            f"inserts and evictions a second for {churn['seconds']} s, the longest of {thousands(churn['lookups'])} "
            f"look-ups took **{thousands(churn['longest_us'])}** microseconds. The most processor time of one look-up "
            f"was **{thousands(churn['longest_cpu_us'])}** microseconds; pauses of the host do not count here.\n",
        ]
    )


# --- tables

CLOSED = {"checks/s": ("checks_per_second", 0), "CPU per check": ("cpu_us", 2), "p50": ("p50", 0), "p99": ("p99", 0)}
OPEN = {"CPU per check": ("cpu_us", 2), "p50": ("p50", 0), "p99": ("p99", 0), "p99.9": ("p99.9", 0)}
OTHER_LOAD = {"p50": ("p50", 0), "p99": ("p99", 0), "p99.9": ("p99.9", 0), "longest": ("max", 0)}
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
    """Returns the table of one set of rounds. Times are in microseconds."""
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
    """Writes a bar chart with the median, minimum and maximum of each row."""
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


# --- the machine and the commit


def machine():
    """Describes processors, memory and kernel, without a host name."""
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
    """Returns the measured commit, with a mark if files other than docs/ had uncommitted changes."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs").stdout.strip()
    named = git("describe", "--always").stdout.strip() or "unknown"
    return f"{named}-dirty" if changed else named
