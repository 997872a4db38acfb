#!/usr/bin/env python3
"""Sends the rows of the table over gRPC, with Envoy's messages from xds-protos and the client of grpcio.

The program also sends every truncation of a valid message.
"""

import json

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import attribute_context_pb2, external_auth_pb2
from google.protobuf import json_format

from runner import ENCODINGS, Findings, Given, end_with_input

METHOD = "/envoy.service.auth.v3.Authorization/Check"
SECONDS_MAX = 30  # for one call; usually about 0.03


def main():
    end_with_input()
    given, findings = Given(), Findings()
    calls = {name: connect(server["port"]) for name, server in given.servers.items()}
    for row in given.rows:
        for encoding in ENCODINGS:
            message = row.message if row.message is not None else check_request(row, encoding)
            findings.compare(f"{row.name} ({encoding})", row.want[encoding], send(calls[row.server], message))
    rows = findings.checked
    truncations = truncated(given, calls, findings)
    findings.end(f"over gRPC: {len(given.rows)} of {len(given.rows)} rows, {rows} checks; {truncations} truncations")


def truncated(given, calls, findings):
    """Sends every truncation of a message that would be granted. Each must be denied, without a gRPC error."""
    row = next(row for row in given.rows if row.name == "the key in its header: good key with scopes")
    count = 0
    for encoding in ENCODINGS:
        message = check_request(row, encoding)
        for length in range(len(message)):
            answer = send(calls[row.server], message[:length])
            findings.compare(f"{length} bytes of {len(message)} ({encoding})", "denied", answer["kind"])
            count += 1
        findings.compare(f"all bytes ({encoding})", "ok", send(calls[row.server], message)["kind"])
    return count


def connect(port):
    channel = grpc.insecure_channel(
        f"127.0.0.1:{port}",
        # A retry would hide that the server closed a connection during a call.
        options=[("grpc.enable_retries", 0), ("grpc.max_send_message_length", -1)],
    )
    return channel.unary_unary(
        METHOD,
        request_serializer=lambda message: message,
        response_deserializer=external_auth_pb2.CheckResponse.FromString,
    )


def send(call, message):
    try:
        return answer(call(message, timeout=SECONDS_MAX))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and error.details() == "the request could not be decided":
            return {"kind": "unavailable"}
        return {"kind": f"gRPC error {error.code()}: {error.details()}"}


def check_request(row, encoding):
    request = external_auth_pb2.CheckRequest()
    attributes = request.attributes
    attributes.context_extensions.update(row.route)
    attributes.source.SetInParent()
    if row.address == "unix":
        attributes.source.address.pipe.path = "@"
    elif row.address:
        attributes.source.address.socket_address.address = row.address
        attributes.source.address.socket_address.port_value = 40000
    attributes.request.time.seconds = 1
    http = attributes.request.http
    http.id, http.host, http.scheme, http.protocol = "1", "table.test", "http", "HTTP/1.1"
    http.method, http.path = row.method, row.path
    pseudo = [(":authority", b"table.test"), (":method", row.method.encode()), (":path", row.path.encode())]
    joined = {}
    for name, value in pseudo + row.headers:
        if encoding == "raw":
            http.header_map.headers.append(base_pb2.HeaderValue(key=name, raw_value=value))
        else:
            joined.setdefault(name.lower(), []).append(value)
    for name, values in joined.items():
        http.headers[name] = b",".join(values).decode("utf-8", errors=ENVOY_ERRORS)
    return request.SerializeToString()


ENVOY_ERRORS = "one-mark-a-byte"  # Envoy replaces each byte that is not UTF-8 with a mark


def register():
    import codecs

    codecs.register_error(ENVOY_ERRORS, lambda error: ("!" * (error.end - error.start), error.end))


register()


def answer(response):
    """Converts the response to the form of the table's expected answers."""
    assert response.HasField("status"), "the reply has no status"
    code, kind = response.status.code, response.WhichOneof("http_response")
    metadata = json_format.MessageToDict(response.dynamic_metadata)
    if kind == "ok_response":
        ok = response.ok_response
        removed = list(ok.headers_to_remove)
        headers = overwrites(ok.headers)
        assert not set(removed) & set(headers), "a header is both set and removed"
        assert not ok.query_parameters_to_set and not ok.response_headers_to_add
        return {
            "kind": "ok",
            "code": code,
            "set": headers,
            "remove": sorted(removed),
            "query": list(ok.query_parameters_to_remove),
            "metadata": metadata,
        }
    denied = getattr(response, kind)
    return {
        "kind": {"denied_response": "denied", "error_response": "error"}[kind],
        "code": code,
        "status": denied.status.code,
        "headers": overwrites(denied.headers),
        "body": json.loads(denied.body),
        "metadata": metadata,
    }


def overwrites(options):
    headers = {}
    for option in options:
        assert option.HasField("append") and option.append.value is False, option
        assert option.append_action == base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD, option
        assert option.header.value and not option.header.raw_value, option
        assert option.header.key not in headers, f"{option.header.key} is set twice"
        headers[option.header.key] = option.header.value
    return headers


assert attribute_context_pb2  # the request contains messages of this module

main()
