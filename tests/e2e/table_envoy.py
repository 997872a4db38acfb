#!/usr/bin/env python3
"""Sends the rows of the table through a real Envoy with envoy/envoy.yaml to a real application.

Envoy has three listeners for each server of the table. `raw` and `map` use its two encodings of headers and do not
remove identity headers early, so that trustgate's answer must replace forged ones. `shipped` is the unchanged
configuration. The program compares the answer to the client, the request at the application, and Envoy's access log
with the table.
"""

import copy
import json
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request

import yaml

from runner import Findings, Given, end_with_input

SECONDS_MAX = 60  # until Envoy is ready, answers or writes its log; usually 1
LISTENERS = {"raw": "raw", "map": "map", "shipped": "raw"}  # listener: encoding
EXT_AUTHZ = "envoy.filters.http.ext_authz"
IDENTITY = ["x-trust-id", "x-trust-key-id", "x-trust-scopes"]
# Headers that Envoy or this program adds or changes.
HOP_BY_HOP = {"connection", "host", "x-forwarded-for", "content-length"}


def main():
    end_with_input()
    given, findings = Given(), Findings()
    rows = [row for row in given.rows if row.not_envoy is None]
    demands = [dict(pairs) for pairs in sorted({tuple(sorted(row.route.items())) for row in rows})]
    application = Application()
    envoy = Envoy(given, configuration(given, demands, application.port))
    try:
        sent = []
        for number, row in enumerate(rows):
            for listener, encoding in LISTENERS.items():
                host = f"{number}-{listener}.d{demands.index(row.route)}.test"
                answer = send(envoy.port(f"{row.server} {listener}"), row, host)
                sent.append((row, f"{row.name} (Envoy, {listener})", host, row.want[encoding], answer))
        # Envoy logs a request that it cannot parse without a host.
        log = envoy.log(len(sent))
        for row, name, host, want, answer in sent:
            if row.envoy_refuses:
                got = (answer.status, host in application.seen)
                findings.compare(f"{name}: status, request at the application", (row.envoy_refuses, False), got)
                continue
            compare(findings, name, row, host, want, answer, application.seen.get(host), log.get(host), given.secrets)
    finally:
        envoy.stop()
    refused = sum(row.envoy_refuses is not None for row in rows)
    left = [row for row in given.rows if row.not_envoy is not None]
    reasons = {}
    for row in left:
        reasons[row.not_envoy] = reasons.get(row.not_envoy, 0) + 1
    findings.end(
        f"through Envoy: {len(rows)} of {len(given.rows)} rows, {len(sent)} requests, {findings.checked} comparisons,"
        f" {refused} rows refused by Envoy itself; {len(left)} left out:"
        + "".join(f"\n  {count:2} {reason}" for reason, count in sorted(reasons.items()))
    )


# --- comparison


def compare(findings, name, row, host, want, answer, seen, log, secrets):
    status = {"ok": 200, "unavailable": 503}.get(want["kind"]) or want["status"]
    findings.compare(f"{name}: status", status, answer.status)
    metadata = {} if want["kind"] == "unavailable" else want["metadata"]
    logged = {key: (log or {}).get(key) for key in ("trust_id", "key_id", "scopes", "anonymous", "reason")}
    logged = {key: value for key, value in logged.items() if value is not None}
    findings.compare(f"{name}: metadata in the access log", metadata, logged)
    if want["kind"] != "ok":
        findings.compare(f"{name}: the application got the request", False, seen is not None)
        refused(findings, name, row, want, answer)
    elif seen is None:
        findings.compare(f"{name}: the application got the request", True, False)
    else:
        passed(findings, name, row, want, seen)
        if not row.stays:
            leaked = [secret for secret in secrets if secret.encode() in seen.head]
            findings.compare(f"{name}: keys in the request at the application", [], leaked)


def refused(findings, name, row, want, answer):
    if want["kind"] == "unavailable":  # Envoy answers itself, as `status_on_error` says
        findings.compare(f"{name}: body", b"", answer.body)
        return
    for header in ("www-authenticate", "content-type", "cache-control", "retry-after"):
        findings.compare(f"{name}: {header}", want["headers"].get(header), answer.header(header))
    if row.method == "HEAD":
        findings.compare(f"{name}: body", b"", answer.body)
    else:
        findings.compare(f"{name}: body", want["body"], json.loads(answer.body or b"null"))


def passed(findings, name, row, want, seen):
    findings.compare(f"{name}: path at the application", row.path_left, seen.path)
    sent = {}
    for header, value in row.headers:
        sent.setdefault(header.lower(), []).append(value)
    for header in {*sent, *IDENTITY, *want["set"], "cookie", "authorization", "x-api-key"} - HOP_BY_HOP:
        if header in want["remove"]:
            expected = None
        elif header in want["set"]:
            expected = want["set"][header].encode()
        else:  # Envoy joins some of its own accord
            expected = b",".join(sent[header]) if header in sent else None
        got = b",".join(seen.headers[header]) if header in seen.headers else None
        findings.compare(f"{name}: {header} at the application", expected, got)
        if header in want["set"]:
            findings.compare(f"{name}: number of {header} headers", 1, len(seen.headers.get(header, [])))


# --- the client


class Message:
    """A parsed HTTP/1.1 message."""

    def __init__(self, data):
        self.head, _, self.body = data.partition(b"\r\n\r\n")
        self.first, *lines = self.head.split(b"\r\n")
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            self.headers.setdefault(name.decode().lower(), []).append(value.strip(b" \t"))

    @property
    def status(self):
        return int(self.first.split()[1]) if self.first else None

    @property
    def path(self):
        return self.first.split(b" ")[1].decode()

    def header(self, name):
        values = self.headers.get(name)
        return b",".join(values).decode() if values else None


def send(port, row, host):
    head = f"{row.method} {row.path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n".encode()
    for name, value in row.headers:
        head += name.encode() + b": " + value + b"\r\n"
    source = (row.address, 0)
    with socket.create_connection(("127.0.0.1", port), SECONDS_MAX, source_address=source) as connection:
        connection.sendall(head + b"\r\n")
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return Message(answer)


# --- the application


class Application:
    """Records each request by its host."""

    def __init__(self):
        self.seen = {}
        application = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                data = b""
                while True:
                    while b"\r\n\r\n" not in data:
                        part = self.request.recv(1 << 16)
                        if not part:
                            return
                        data += part
                    head, _, data = data.partition(b"\r\n\r\n")
                    message = Message(head)
                    application.seen[message.header("host")] = message
                    self.request.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 128

        server = Server(("127.0.0.1", 0), Handler)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()


# --- Envoy


def configuration(given, demands, application_port):
    """Returns envoy/envoy.yaml with listeners for each server. All other changes to the file are also made here."""
    config = yaml.safe_load(given.envoy_config.read_text())
    at(config["admin"]["address"], 0)
    resources = config["static_resources"]
    (shipped,) = resources["listeners"]
    application, trustgate = (one(resources["clusters"], name) for name in ("app", "trustgate"))
    at(endpoint(application), application_port)
    resources["listeners"], resources["clusters"] = [], [application]
    for name, server in given.servers.items():
        cluster = copy.deepcopy(trustgate)
        cluster["name"] = cluster["load_assignment"]["cluster_name"] = cluster_of(name)
        at(endpoint(cluster), server["port"])
        # Long timeouts, because this test compares answers and must pass on a slow machine.
        cluster["connect_timeout"] = "10s"
        cluster["health_checks"][0]["timeout"] = "10s"
        resources["clusters"].append(cluster)
        for kind in LISTENERS:
            resources["listeners"].append(listener(shipped, name, server, kind, demands))
    return config


def listener(shipped, name, server, kind, demands):
    made = copy.deepcopy(shipped)
    made["name"] = f"{name} {kind}"
    at(made["address"], 0)
    manager = made["filter_chains"][0]["filters"][0]["typed_config"]
    # Large requests must reach trustgate.
    manager["max_request_headers_kb"] = 8192
    manager["common_http_protocol_options"]["max_headers_count"] = 30000
    if kind != "shipped":
        del manager["early_header_mutation_extensions"]
    logged = manager["access_log"][0]["typed_config"]["log_format"]["json_format"]
    logged["host"] = "%REQ(:AUTHORITY)%"
    for key in ("scopes", "anonymous"):
        logged[key] = f"%DYNAMIC_METADATA({EXT_AUTHZ}:{key})%"
    (everything,) = manager["route_config"]["virtual_hosts"]
    everything["routes"] = [route for route in everything["routes"] if route["name"] == "default"]
    manager["route_config"]["virtual_hosts"] = [host(everything, number, one) for number, one in enumerate(demands)]
    check = one(manager["http_filters"], EXT_AUTHZ)["typed_config"]
    check["encode_raw_headers"] = LISTENERS[kind] == "raw"
    check["grpc_service"]["envoy_grpc"]["cluster_name"] = cluster_of(name)
    check["grpc_service"]["timeout"] = "20s"
    check["grpc_service"]["retry_policy"]["retry_back_off"]["max_interval"] = "20s"
    # The extensions for other credential sources that the comments in envoy/envoy.yaml describe.
    names = "|".join([*IDENTITY, *server["credential_headers"]])
    rules = check["decoder_header_mutation_rules"]
    if server["credential_headers"] == ["x-api-key"]:
        allowed = re.compile(rules["allow_expression"]["regex"])
        assert all(allowed.search(name) for name in names.split("|")), rules
    rules["allow_expression"]["regex"] = f"^({names})$"
    return made


def host(everything, number, demands):
    """Returns a virtual host whose route has these context_extensions."""
    made = copy.deepcopy(everything)
    made["name"], made["domains"] = f"d{number}", [f"*.d{number}.test"]
    if demands:
        made["typed_per_filter_config"] = {
            EXT_AUTHZ: {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
                "check_settings": {"context_extensions": demands},
            }
        }
    return made


def cluster_of(server):
    """Returns the name of the cluster, without blanks because Envoy also uses it as the authority of the calls."""
    return "trustgate-" + server.replace(" ", "-")


def one(items, name):
    (found,) = [item for item in items if item["name"] == name]
    return found


def endpoint(cluster):
    return cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]


def at(address, port):
    address["socket_address"]["port_value"] = port


# Runs a program and kills it when standard input ends, so that Envoy ends even if this process is killed.
GUARD = '"$@" & child=$!; read -r _; kill $child; wait $child'


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores a proxy in the environment


class Envoy:
    def __init__(self, given, config):
        directory = given.directory
        (directory / "envoy.yaml").write_text(yaml.safe_dump(config))
        self.out, self.errors, admin = directory / "envoy.out", directory / "envoy.err", directory / "admin"
        options = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
        options += ["--file-flush-interval-msec", "50", "--admin-address-path", str(admin)]
        command = ["sh", "-c", GUARD, "sh", given.envoy, "-c", str(directory / "envoy.yaml"), *options]
        with self.out.open("wb") as out, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=errors)
        self.wait("start", lambda: admin.is_file() and admin.read_text().strip())
        self.admin = admin.read_text().strip()
        self.wait("be ready", lambda: self.get("/ready") is not None)
        healthy = re.compile(r"^trustgate-[^:]*::[0-9.:]+::health_flags::healthy$", re.MULTILINE)
        count = len(given.servers)
        self.wait("find every trustgate healthy", lambda: len(healthy.findall(self.get("/clusters") or "")) == count)
        listeners = json.loads(self.get("/listeners?format=json"))["listener_statuses"]
        self.ports = {one["name"]: one["local_address"]["socket_address"]["port_value"] for one in listeners}

    def port(self, name):
        return self.ports[name]

    def get(self, path):
        try:
            with DIRECT.open(f"http://{self.admin}{path}", timeout=SECONDS_MAX) as answer:
                return answer.read().decode()
        except OSError:
            return None

    def log(self, lines):
        """Returns Envoy's access log by host, once it has `lines` lines. Envoy writes shortly after its answer."""
        self.wait(f"log {lines} requests", lambda: self.out.read_bytes().count(b"\n") >= lines)
        entries = [json.loads(line) for line in self.out.read_text().splitlines()]
        return {entry["host"]: entry for entry in entries if entry["host"]}

    def wait(self, event, probe):
        end = time.monotonic() + SECONDS_MAX
        while not probe():
            if time.monotonic() > end or self.process.poll() is not None:
                sys.exit(f"Envoy did not {event}:\n" + self.errors.read_text(errors="replace")[-4000:])
            time.sleep(0.02)

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


main()
