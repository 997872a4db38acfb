"""The programs of a benchmark: servers run on one processor, the sender and all other programs on another.

At its end the fixture stops every program that it started and removes its directory below target/. The programs do not
get the caller's settings.
"""

import glob
import hashlib
import http.client
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_MAX = 60  # until a program is ready or a command ends, plus the requested duration of the command
LATE_MAX = 0.001  # the share of checks that may fail because the machine paused
TICKS = os.sysconf("SC_CLK_TCK")


class Broken(Exception):
    """The benchmark cannot continue, or its result would be wrong."""


class Fixture:
    """Starts and stops the programs, and sends load to them."""

    def __init__(self, programs):
        self.programs = programs  # the paths of trustgate, always_allow, load, envoy and so on
        self.children = []
        self.outside = []  # directories outside target/, for programs that run as another user
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) < 2:
            raise Broken("too few processors: two are needed, one for the server and one for the sender")
        self.server_cpu, self.other_cpu = processors[0], processors[-1]

    def __enter__(self):
        for program in self.programs.values():
            if not Path(program).is_file():
                raise Broken(f"{program} is missing: run `make bench-ready`")
        for name in ("taskset", "redis-server"):
            if not shutil.which(name):
                raise Broken(f"{name} is missing: run `tools/packages bench`")
        self.dir = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "target"))
        return self

    def __exit__(self, *_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
        for child in reversed(self.children):
            child.stop()
        for directory in (self.dir, *self.outside):
            shutil.rmtree(directory, ignore_errors=True)

    # --- servers

    def start(self, name, command, cpu, env=None, stop_signal=signal.SIGTERM, wrap=(), keep_output=True):
        """Starts a program on one processor, under the command `wrap` if given."""
        command = ["taskset", "-c", str(cpu), *wrap, *command]
        command = [str(part) for part in command]
        child = Child(name, command, env or clean_environment(), self.dir, stop_signal, keep_output)
        self.children.append(child)
        return child

    def stop(self, child):
        child.stop()
        self.children.remove(child)

    def yardstick(self, current_thread, wrap=()):
        address = free_address()
        name = "yardstick-current-thread" if current_thread else "yardstick"
        options = ["--current-thread"] if current_thread else []
        command = [self.programs["always_allow"], "--listen", address, *options]
        server = self.start(name, command, self.server_cpu, wrap=wrap)
        server.address = address
        self.wait(server, lambda: accepts(address))
        return server

    def redis(self):
        address = free_address()
        options = ["--bind", "127.0.0.1", "--port", address.rpartition(":")[2], "--save", "", "--appendonly", "no"]
        server = self.start("redis", ["redis-server", *options, "--dir", self.dir], self.other_cpu)
        server.address = address
        self.wait(server, lambda: accepts(address))
        return server

    def postgres(self):
        """Starts a PostgreSQL with default settings. Clients connect to a socket in its directory `home`."""
        home = Path(tempfile.mkdtemp(prefix="trustgate-bench-"))
        self.outside.append(home)
        wrap = ()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = pwd.getpwnam("nobody")
            os.chown(home, user.pw_uid, user.pw_gid)
            wrap = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
        options = ("--username=admin", "--auth=trust", "--no-locale", "--encoding=UTF8", "-D", home / "data")
        self.run([*wrap, postgres_program("initdb"), *options])
        command = [postgres_program("postgres"), "-D", home / "data", "-k", home, "-c", "listen_addresses="]
        server = self.start("postgres", command, self.other_cpu, stop_signal=signal.SIGINT, wrap=wrap)
        server.home = home
        self.wait(server, lambda: (home / "data" / "postmaster.pid").exists() and accepts_at(home / ".s.PGSQL.5432"))
        return server

    def database(self, server, name):
        """Creates a database and returns its URL."""
        self.run([postgres_program("createdb"), "-h", server.home, "-U", "admin", name])
        return f"postgres://admin@localhost/{name}?host={server.home}"

    def run(self, command):
        command = [str(word) for word in command]
        done = subprocess.run(command, env=clean_environment(), cwd="/", capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise Broken(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    def instance(self, name="instance", **settings):
        """Returns an instance of trustgate with these settings: {"section.name": value}."""
        return Instance(self, name, settings)

    def wait(self, child, probe, seconds=SECONDS_MAX):
        end = time.monotonic() + seconds
        while not probe():
            child.alive()
            if time.monotonic() > end:
                raise Broken(f"timeout: waited {seconds} s for {child.name}" + child.tail())
            time.sleep(0.01)

    # --- load

    def load(self, address, *options, seconds, warm_up=1.0, cpu=None):
        """Sends checks and returns the results. Raises `Broken` if an answer is not as expected.

        `others` in the results is the share of a processor that other programs used.
        """
        began, all_before, own_before = time.monotonic(), machine_seconds(), self.own_seconds()
        command = [self.programs["load"], address, "--seconds", seconds, "--warm-up", warm_up, *options]
        command = ["taskset", "-c", self.other_cpu if cpu is None else cpu, *command]
        command = [str(part) for part in command]
        sender = subprocess.Popen(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = sender.communicate(timeout=seconds + warm_up + SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise Broken(f"timeout: the sender did not end: {' '.join(command)}") from None
        finally:
            if sender.poll() is None:
                sender.kill()
                sender.communicate()
        if sender.returncode != 0:
            for child in self.children:
                child.alive()
            raise Broken(f"{' '.join(command)}\n{err}{out}" + "".join(child.tail() for child in self.children))
        result = json.loads(out)
        others = machine_seconds() - all_before - (self.own_seconds() - own_before)
        result["others"] = max(others, 0.0) / (time.monotonic() - began)
        return result

    def own_seconds(self):
        """Returns the processor time of this process and of all programs that it started."""
        return sum(child.cpu_seconds() for child in self.children) + sum(os.times()[:4])

    def fill(self, server, file, *more):
        """Sends every key of the file until the cache has it. Returns the seconds that this took.

        Another pass repeats the keys for which the read timed out.
        """
        seconds = 0.0
        for _ in range(5):
            options = ("--keys", file, "--order", "once", "--expect", "answer", "-c", 4, "-m", 8, *more)
            result = self.load(server.address, *options, seconds=7_200, warm_up=0)
            seconds += result["seconds"]
            if result["denials"] + result["faults"] == 0:
                return seconds
        raise Broken(f"cache not filled: {result['faults']} faults in the fifth pass" + server.tail())

    def grants(self, address, *options, **more):
        """Sends checks that must be granted. A few may fail, because the machine may have paused."""
        result = self.load(address, *options, "--expect", "answer", **more)
        if result["denials"] > 0 or result["faults"] > LATE_MAX * result["answered"]:
            counts = f"{result['denials']} denials and {result['faults']} faults"
            raise Broken(f"not all checks were granted: {counts} in {result['answered']} checks")
        return result

    def measured(self, server, *options, **more):
        """Sends checks, which must be granted unless `--expect` is given, and adds the server's `cpu_us` per check."""
        before = server.cpu_seconds()
        load = self.load if "--expect" in options else self.grants
        result = load(server.address, *options, **more)
        result["cpu_us"] = (server.cpu_seconds() - before) * 1e6 / result["answered"]
        return result


class Instance:
    """An instance of trustgate with its settings and its database."""

    def __init__(self, fixture, name, settings):
        self.fixture, self.name, self.server = fixture, name, None
        self.state = fixture.dir / name
        self.state.mkdir()
        self.admin = free_address()
        self.settings = {"grpc.listen": free_address(), "admin.listen": self.admin, **settings}

    def environment(self, settings=None):
        named = {f"TRUSTGATE__{n.upper().replace('.', '__')}": str(v) for n, v in (settings or self.settings).items()}
        return clean_environment() | {"STATE_DIRECTORY": str(self.state)} | named

    def serve(self, wrap=(), seconds=SECONDS_MAX, **changes):
        """Starts the server and waits until it is ready. `started_in` of the result is the time that this took."""
        settings = self.settings | changes
        began = time.monotonic()
        self.server = self.fixture.start(
            "trustgate",
            [self.fixture.programs["trustgate"], "serve"],
            self.fixture.server_cpu,
            self.environment(settings),
            signal.SIGINT,  # after SIGINT, unlike SIGTERM, trustgate stops without the drain delay
            wrap,
        )
        self.fixture.wait(self.server, lambda: get(self.admin, "/readyz") is not None, seconds)
        self.server.started_in = time.monotonic() - began
        self.server.address = settings["grpc.listen"]
        return self.server

    def stop(self):
        self.fixture.stop(self.server)

    def command(self, *words, seconds=SECONDS_MAX):
        """Runs a command of trustgate and returns its output, parsed as JSON."""
        command = [str(word) for word in (self.fixture.programs["trustgate"], "--output", "json", *words)]
        done = subprocess.run(
            command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if done.returncode != 0:
            raise Broken(f"`trustgate {' '.join(command[3:])}` ended with {done.returncode}:\n{done.stderr}")
        return json.loads(done.stdout or "null")

    def issue(self, keys, trusts, file, prefix="tenant"):
        """Imports keys, distributed evenly over `trusts` trusts, and writes each key with its trust to `file`."""
        self.command("migrate")
        ids = [self.command("trust", "create", f"{prefix}-{number}")["id"] for number in range(trusts)]
        for number, trust in enumerate(ids):
            chunk = self.state / "import"
            chunk.write_text("".join(f"{sha256(key)}\n" for key in keys[number::trusts]))
            self.command("key", "import", "--trust", trust, chunk, seconds=600)
            chunk.unlink()
        file.write_text("".join(f"{key} {ids[number % trusts]}\n" for number, key in enumerate(keys)))
        return file

    def metric(self, line):
        """Returns the value of a metric, named with its labels as in /metrics, or 0 if it is absent."""
        for found in (get(self.admin, "/metrics") or "").splitlines():
            name, _, value = found.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0

    def lookups(self, tier, outcome):
        return self.metric(f'trustgate_cache_lookups_total{{kind="api_key",outcome="{outcome}",tier="{tier}"}}')


class Child:
    """A program that the fixture started. Its output is in a file."""

    def __init__(self, name, command, env, directory, stop_signal, keep_output=True):
        self.name, self.stop_signal = name, stop_signal
        self.log = directory / f"{name}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=env,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log if keep_output else subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only the benchmark, which then stops the programs
            )

    def alive(self):
        if self.process.poll() is not None:
            raise Broken(f"{self.name} ended with status {self.process.returncode}" + self.tail())

    def tail(self):
        last = self.log.read_text(errors="replace").splitlines()[-10:]
        return f"\n--- the end of the log of {self.name}:\n" + "\n".join(last or ["(empty)"])

    def stop(self, seconds=30):
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def cpu_seconds(self):
        """Returns the user and system time of all threads so far, including threads that ended."""
        if self.process.poll() is not None:
            return 0.0  # os.times() counts it among the children that ended
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise Broken(f"{self.name} has no resident memory")


# --- keys

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def make_keys(count, seed=1):
    """Returns keys in trustgate's format (see `credential::format`). A seed always gives the same keys."""
    source = random.Random(seed)
    keys = []
    for _ in range(count):
        body = "".join(source.choices(ALPHABET, k=43))
        keys.append(f"tg_{body}{base62(zlib.crc32(f'tg_{body}'.encode()), 6)}")
    return keys


def base62(number, digits):
    text = []
    for _ in range(digits):
        number, digit = divmod(number, 62)
        text.append(ALPHABET[digit])
    return "".join(reversed(text))


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# --- helpers


def clean_environment():
    unwanted = ("STATE_DIRECTORY", "RUST_LOG")
    return {k: v for k, v in os.environ.items() if not k.startswith("TRUSTGATE") and k not in unwanted}


def machine_seconds():
    """Returns the busy time of all processors, including the time that the hypervisor gave to other machines."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


_used_ports = set()


def free_address():
    """Returns an address with an unused port, below the range for outgoing connections. Every call returns another."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _used_ports:
            _used_ports.add(port)
            return f"127.0.0.1:{port}"


def accepts_at(path):
    """Returns whether a server listens on the Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
            return True
        except OSError:
            return False


def postgres_program(name):
    """Returns the path of one of PostgreSQL's programs. Debian does not put them into PATH."""
    for path in (shutil.which(name), *sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))):
        if path:
            return path
    raise Broken(f"PostgreSQL's {name} is missing: run `tools/packages bench`")


def accepts(address):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        return True
    except OSError:
        return False


def get(address, path):
    """Returns the body of an answer with status 200, else None."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        return body if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def answers(address, path):
    """Returns whether the server answers, with any status."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read() is not None
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def say(line=""):
    print(line, flush=True)


def progress(text):
    """Shows the current step. On a terminal, each step overwrites the line of the previous one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)
