"""Common parts of the Python programs that run the table: their input, and the comparison of results."""

import base64
import json
import os
import sys
import threading
from pathlib import Path

ENCODINGS = ("raw", "map")


class Row:
    """One row of the table. The Rust test has replaced its placeholders."""

    def __init__(self, given):
        self.name, self.server, self.method = given["name"], given["server"], given["method"]
        self.path, self.address, self.route = given["path"], given["from"], given["route"]
        self.headers = [(name, base64.b64decode(value)) for name, value in given["headers"]]
        self.message = None if given["message"] is None else base64.b64decode(given["message"])
        self.want, self.path_left, self.stays = given["want"], given["path_left"], given["stays"]
        self.not_envoy, self.envoy_refuses = given["not_envoy"], given["envoy_refuses"]


class Given:
    """The input from the Rust test: rows, servers, secrets and paths."""

    def __init__(self):
        path, directory, envoy, envoy_config = sys.argv[1:]
        given = json.loads(Path(path).read_text())
        self.rows = [Row(row) for row in given["rows"]]
        self.servers, self.secrets = given["servers"], given["secrets"]
        self.directory, self.envoy, self.envoy_config = Path(directory), envoy, Path(envoy_config)


def end_with_input():
    """Exits when standard input ends, so that this process does not outlive its parent, even a killed one."""

    def wait():
        while os.read(0, 1):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


class Findings:
    def __init__(self):
        self.wrong, self.checked = [], 0

    def compare(self, name, want, got):
        self.checked += 1
        if want != got:
            self.wrong.append(f"{name}:\n  want {shown(want)}\n  got  {shown(got)}")

    def end(self, summary):
        print(summary)
        for line in self.wrong:
            print(line, file=sys.stderr)
        sys.stdout.flush()
        sys.exit(f"{len(self.wrong)} results differ from the table" if self.wrong else 0)


def shown(value):
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=repr)
    return text if len(text) < 2000 else text[:2000] + "..."
