"""Requests that no server should take at their word: each is refused, or its connection closed, and that is all.

A case says which statuses are right; `CLOSED` is none at all. Where something is smuggled, it shows the right key and
asks for something harmless: an answer with 200 is a request too many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

KEY = "sk-test-0123456789abcdef"
CLOSED = 0
REFUSED = frozenset({400, 401, 403, 404, 405, 408, 413, 415, 431, 505, CLOSED})
BAD = frozenset({400})
SLOW = frozenset({408, CLOSED})

HOST = b"Host: 127.0.0.1\r\n"
AUTH = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
JSON = b"Content-Type: application/json\r\n"
TE = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = b"GET /version HTTP/1.1\r\n" + HOST + AUTH + b"\r\n"
PROMPT = b'{"prompt":"a","max_tokens":1}'
_BODY = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON
"""A completion without a key: unless something else is wrong with it, 401."""

CONTROLS = [*range(0x00, 0x09), *range(0x0A, 0x20), 0x7F]


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    right: frozenset[int] = REFUSED


def cases() -> list[Case]:
    """All of them, with names of their own."""
    found = [*_lines(), *_targets(), *_headers(), *_hosts(), *_lengths(), *_chunks(), *_sizes(), *_cut(), *_foreign()]
    assert len({case.name for case in found}) == len(found)
    return found


def _lines() -> Iterator[Case]:
    for name, line in {
        "no version": b"GET /health",
        "version 0.9": b"GET /health HTTP/0.9",
        "version 1.2": b"GET /health HTTP/1.2",
        "version 2.0": b"GET /health HTTP/2.0",
        "version 9.9": b"GET /health HTTP/9.9",
        "version 11": b"GET /health HTTP/11",
        "version 1.10": b"GET /health HTTP/1.10",
        "version 1.1x": b"GET /health HTTP/1.1x",
        "version lower": b"GET /health http/1.1",
        "version HTP": b"GET /health HTP/1.1",
        "version blank": b"GET /health HTTP/ 1.1",
        "trailing blank": b"GET /health HTTP/1.1 ",
        "two targets": b"GET /health /ready HTTP/1.1",
        "tab": b"GET\t/health HTTP/1.1",
        "no target": b"GET HTTP/1.1",
        "no method": b"/health HTTP/1.1",
        "leading blank": b" GET /health HTTP/1.1",
        "unknown method": b"FETCH /health HTTP/1.1",
        "lower method": b"get /health HTTP/1.1",
        "long method": b"G" * 5000 + b" /health HTTP/1.1",
        "binary method": b"\x16\x03\x01 /health HTTP/1.1",
        "method with colon": b"GET: /health HTTP/1.1",
        "connect": b"CONNECT 127.0.0.1:80 HTTP/1.1",
        "connect path": b"CONNECT /health HTTP/1.1",
        "pri": b"PRI * HTTP/2.0",
        "options star": b"OPTIONS * HTTP/1.1",
        "trace": b"TRACE /v1/completions HTTP/1.1",
        "rtsp": b"DESCRIBE /v1/completions RTSP/1.0",
        "ice": b"SOURCE /v1/completions ICE/1.0",
        "bare CR": b"GET /health HTTP/1.1\rX: 1",
        "CR CR": b"GET /health HTTP/1.1\r",
    }.items():
        yield Case(f"line {name}", line + b"\r\n" + HOST + b"\r\n")
    yield Case("line bare LF", b"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n", BAD)
    yield Case("line LF then CRLF", b"GET /health HTTP/1.1\n" + HOST + b"\r\n", BAD)
    yield Case("line twice", b"GET /health HTTP/1.1\r\nGET /health HTTP/1.1\r\n" + HOST + b"\r\n", BAD)
    for word in (b"PUT", b"PATCH", b"DELETE", b"PROPFIND", b"LINK", b"PURGE", b"MKCOL", b"SUBSCRIBE", b"QUERY"):
        yield Case(f"method {word.decode()}", word + b" /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n")


def _targets() -> Iterator[Case]:
    odd = {
        "absolute": b"http://127.0.0.1/health",
        "absolute foreign": b"http://elsewhere.example/v1/models",
        "absolute https": b"https://127.0.0.1/health",
        "scheme alone": b"http://",
        "authority": b"127.0.0.1:80",
        "userinfo": b"http://user:pass@127.0.0.1/health",
        "star": b"*",
        "relative": b"health",
        "dots": b"../health",
        "question": b"?x",
        "fragment": b"/health#x",
        "empty fragment": b"/health#",
        "high bytes": b"/\xc3\xa9",
        "overlong": b"/\xc0\xae\xc0\xae/health",
        "file": b"file:///etc/passwd",
    }
    for name, target in odd.items():
        yield Case(f"target {name}", b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n", BAD)
    for byte in (*CONTROLS, 0x20, 0x80, 0xFF):
        yield Case(f"target byte {byte:02x}", b"GET /he" + bytes([byte]) + b"alth HTTP/1.1\r\n" + HOST + b"\r\n", BAD)
    for path in (
        *("//v1/models", "/v1//models", "/v1/./models", "/./v1/models", "/v1/../v1/models", "/%2e/v1/models"),
        *("/v1/%2e%2e/v1/models", "/V1/models", "/v1/models%00", "/v1%2fmodels", "/v1/models;x", "/v1\\models"),
        *("/%76%31/models", "/v1/models/", "/health/", "/health/../v1/models", "/health%2f..%2fv1/models", "/ready/"),
        *("/health;/v1/models", "/%zz", "/%", "/.", "/..", "/v1/completions/x", "/metrics", "/redoc", "/admin"),
    ):
        right = frozenset({401, 404})
        yield Case(f"path {path}", f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n", right)


def _headers() -> Iterator[Case]:
    for name, lines in {
        "obs-fold": b"X: a\r\n b",
        "obs-fold tab": b"X: a\r\n\tb",
        "fold first": b" X: a",
        "blank before colon": b"X : a",
        "tab before colon": b"X\t: a",
        "no colon": b"X",
        "no name": b": a",
        "bare LF": b"X: a\nY: b",
        "LF LF": b"X: a\n\n",
        "bare CR": b"X: a\rY: b",
        "CR CR LF": b"X: a\r",
        "high name": b"\xc3\xa9: a",
        "quoted name": b'"X": a',
        "bracket name": b"X[0]: a",
        "host folded": b"Host:\r\n evil.example",
    }.items():
        yield Case(f"header {name}", b"GET /health HTTP/1.1\r\n" + HOST + lines + b"\r\n\r\n", BAD)
    for byte in CONTROLS:
        line = b"X: a" + bytes([byte]) + b"b\r\n"
        yield Case(f"header value byte {byte:02x}", b"GET /health HTTP/1.1\r\n" + HOST + line + b"\r\n", BAD)
    for byte in (*CONTROLS, *b' "(),/:;<=>?@[\\]{}'):
        if byte != ord(":"):
            line = b"X" + bytes([byte]) + b"Y: a\r\n"
            yield Case(f"header name byte {byte:02x}", b"GET /health HTTP/1.1\r\n" + HOST + line + b"\r\n", BAD)
    for kind in (b"text/plain", b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded", b""):
        head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + AUTH + b"Content-Type: " + kind + b"\r\n"
        yield Case(f"content-type {kind.decode()}", head + b"Content-Length: 2\r\n\r\n{}", BAD)
    for coding in (b"gzip", b"br", b"deflate", b"x", b"gzip, gzip", b"identity, gzip"):
        data = _BODY + AUTH + b"Content-Encoding: " + coding + b"\r\nContent-Length: 2\r\n\r\n{}"
        yield Case(f"content-encoding {coding.decode()}", data, frozenset({415}))


def _hosts() -> Iterator[Case]:
    for name, lines in {
        "none": b"",
        "two": HOST + HOST,
        "two different": HOST + b"Host: evil.example\r\n",
        "two in other cases": HOST + b"hOsT: 127.0.0.1\r\n",
    }.items():
        yield Case(f"hosts {name}", b"GET /health HTTP/1.1\r\n" + lines + b"\r\n", BAD)
    for host in (
        *("localhost/v1/models?", "localhost?", "localhost#", "a b", "a,b", "127.0.0.1:80:80", "127.0.0.1:", ":80", ""),
        *("127.0.0.1:999999", "127.0.0.1:8o", "user@localhost", "[::1", "::1", "[::1]x", "a\\b", "a%2fb", "<script>"),
        *("localhost\tx", "[]", "[g::1]", "a" * 300, "http://localhost", "localhost;x", "$(x)", "*"),
    ):
        yield Case(f"host {host[:40]!r}", f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), BAD)


def _lengths() -> Iterator[Case]:
    for value in (
        *(b"+5", b"-1", b"5x", b"0x5", b"5,5", b"5, 6", b"5 5", b"", b" ", b"5.0", b"1e1", b"\xb2", b"5;", b"NaN"),
        *(b"18446744073709551616", b"9" * 30, b"9" * 5000, b"'5'"),
    ):
        data = _BODY + b"Content-Length: " + value + b"\r\n\r\n{}xyz" + SMUGGLED
        yield Case(f"length {value[:32]!r}", data, BAD)
    for name, lines in {
        "twice": b"Content-Length: 2\r\nContent-Length: 2\r\n",
        "two": b"Content-Length: 2\r\nContent-Length: 100\r\n",
        "and chunked": b"Content-Length: 5\r\n" + TE,
        "after chunked": TE + b"Content-Length: 5\r\n",
        "and identity": b"Content-Length: 2\r\nTransfer-Encoding: identity\r\n",
    }.items():
        yield Case(f"length {name}", _BODY + lines + b"\r\n0\r\n\r\n" + SMUGGLED, BAD)
    for length in (b"8388609", b"1000000000000", b"18446744073709551615"):
        head = _BODY + AUTH + b"Content-Length: " + length + b"\r\n\r\n"
        yield Case(f"length of {length.decode()}", head, frozenset({400, 413}))
    yield Case("length without key", _BODY + b"Content-Length: 1000000000000\r\n\r\n", frozenset({401}))
    body = _BODY + AUTH + b"Content-Length: 2\r\n\r\n{]"
    yield Case("smuggled behind a bad body", body + SMUGGLED, BAD)
    yield Case("no length", b"POST /v1/completions HTTP/1.1\r\n" + HOST + AUTH + JSON + b"\r\n" + PROMPT, BAD)


def _chunks() -> Iterator[Case]:
    for value in (
        *(
            b"xchunked",
            b"chunked, identity",
            b"gzip, chunked",
            b"chunked, chunked",
            b"identity",
            b"gzip",
            b"chunked;q=1",
        ),
        *(b"\x0bchunked", b"chunke", b"cow", b"'chunked'", b"chunked,", b",chunked", b"", b"chun\tked", b"chunked\x00"),
    ):
        data = _BODY + b"Transfer-Encoding: " + value + b"\r\n\r\n0\r\n\r\n" + SMUGGLED
        yield Case(f"coding {value!r}", data, BAD)
    yield Case("coding twice", _BODY + TE + TE + b"\r\n0\r\n\r\n" + SMUGGLED, BAD)
    yield Case("coding blank before colon", _BODY + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, BAD)
    yield Case("coding folded", _BODY + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, BAD)
    yield Case("coding in 1.0", _BODY.replace(b"/1.1", b"/1.0") + TE + b"\r\n0\r\n\r\n" + SMUGGLED, BAD)
    for name, body in {
        "negative": b"-1\r\nx\r\n0\r\n\r\n",
        "plus": b"+1\r\nx\r\n0\r\n\r\n",
        "prefixed": b"0x1\r\nx\r\n0\r\n\r\n",
        "letters": b"g\r\nx\r\n0\r\n\r\n",
        "blank size": b"\r\nx\r\n0\r\n\r\n",
        "blank after": b"1 \r\nx\r\n0\r\n\r\n",
        "blank before": b" 1\r\nx\r\n0\r\n\r\n",
        "tab after": b"1\t\r\nx\r\n0\r\n\r\n",
        "bare LF": b"1\nx\r\n0\r\n\r\n",
        "bare CR": b"1\rx\r\n0\r\n\r\n",
        "LF after data": b"1\r\nx\n0\r\n\r\n",
        "no end of data": b"1\r\nx0\r\n\r\n",
        "longer than said": b"1\r\nxy\r\n0\r\n\r\n",
        "shorter than said": b"9\r\nx\r\n0\r\n\r\n",
        "overflow": b"1" + b"0" * 16 + b"\r\nx\r\n0\r\n\r\n",
        "wrap": b"10000000000000001\r\nx\r\n0\r\n\r\n",
        "huge size": b"f" * 500 + b"\r\nx\r\n",
        "extension LF": b"1;a\nb\r\nx\r\n0\r\n\r\n",
        "extension CR": b"1;a\rb\r\nx\r\n0\r\n\r\n",
        "extension NUL": b"1;a\x00b\r\nx\r\n0\r\n\r\n",
        "extension quote": b'1;a="b\r\nx\r\n0\r\n\r\n',
        "NUL size": b"\x001\r\nx\r\n0\r\n\r\n",
        "dot": b"1.0\r\nx\r\n0\r\n\r\n",
    }.items():
        yield Case(f"chunk {name}", _BODY + AUTH + TE + b"\r\n" + body + SMUGGLED, frozenset({400, *SLOW}))
    whole = b"%x\r\n%b\r\n0\r\n" % (len(PROMPT), PROMPT)
    for name, trailer in {
        "trailer": b"X: 1",
        "trailer of a key": AUTH.strip(),
        "trailer of a length": b"Content-Length: 100",
        "trailer of a coding": TE.strip(),
        "trailer without colon": b"X",
    }.items():
        yield Case(name, _BODY + AUTH + TE + b"\r\n" + whole + trailer + b"\r\n\r\n" + SMUGGLED, BAD)
    yield Case("tiny chunks", _BODY + AUTH + TE + b"\r\n" + b"1\r\n \r\n" * 20_000, BAD)
    yield Case("endless extension", _BODY + AUTH + TE + b"\r\n1;" + b"x" * 100_000, BAD)
    yield Case("large extensions", _BODY + AUTH + TE + b"\r\n" + (b"1;" + b"x" * 5000 + b"\r\n \r\n") * 20, BAD)
    yield Case("a short extension without end", _BODY + AUTH + TE + b"\r\n1;" + b"x" * 1000, SLOW)


def _sizes() -> Iterator[Case]:
    large = frozenset({431})
    head = b"GET /health HTTP/1.1\r\n" + HOST
    yield Case("a long header", head + b"X: " + b"x" * 40_000 + b"\r\n\r\n", large)
    yield Case("a long header without end", head + b"X: " + b"x" * 40_000, large)
    yield Case("a long name", head + b"X" * 40_000 + b": x\r\n\r\n", large)
    yield Case("a megabyte of header", head + b"X: " + b"x" * 1_000_000 + b"\r\n\r\n", large)
    yield Case("many headers", head + b"X: 1\r\n" * 101 + b"\r\n", large)
    yield Case("very many headers", head + b"".join(b"X%d: 1\r\n" % n for n in range(20_000)) + b"\r\n", large)
    yield Case("a long target", b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", large)
    yield Case("a long query", b"GET /health?" + b"x" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", large)
    yield Case(
        "a long key", head.replace(b"health", b"version") + b"Authorization: Bearer " + b"x" * 20_000 + b"\r\n\r\n"
    )
    yield Case("many blank lines", b"\r\n" * 30_000, large)
    yield Case("a deep body", _with_length(b"[" * 100_000), BAD)
    yield Case("a deep object", _with_length(b'{"a":' * 50_000), BAD)
    yield Case("a long number", _with_length(b'{"seed":1' + b"0" * 100_000 + b"}"), BAD)
    yield Case("many keys", _with_length(b"{" + b",".join(b'"k%d":1' % n for n in range(50_000)) + b"}"), BAD)
    yield Case("one key often", _with_length(b"{" + b",".join([b'"n":1'] * 50_000) + b"}"), BAD)
    for name, body in {
        "UTF-16": '{"prompt":"a"}'.encode("utf-16"),
        "two BOMs": b"\xef\xbb\xbf" * 2 + PROMPT,
        "NaN": b'{"temperature":NaN}',
        "infinity": b'{"temperature":1e999}',
        "lone surrogate": b'{"prompt":"\\ud800"}',
        "bad UTF-8": b'{"prompt":"\xff"}',
        "overlong UTF-8": b'{"prompt":"\xc0\x80"}',
        "NUL": b'{"prompt":"a"}\x00',
        "key twice": b'{"n":1,"n":100}',
        "key twice escaped": b'{"n":1,"\\u006e":100}',
        "two values": PROMPT + PROMPT,
        "nothing": b"",
        "a million prompts": b'{"prompt":[' + b'"",' * 1_000_000 + b'""]}',
        "prompts times n": b'{"prompt":["a"' + b',"a"' * 1023 + b'],"n":128}',
        "n": b'{"prompt":"a","n":16384}',
        "best_of": b'{"prompt":"a","best_of":1000000}',
        "tokens in all": b'{"prompt":["a"' + b',"a"' * 2000 + b'],"max_tokens":1000000}',
    }.items():
        yield Case(f"body {name}", _with_length(body), BAD)


def _with_length(body: bytes) -> bytes:
    return _BODY + AUTH + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _cut() -> Iterator[Case]:
    whole = _with_length(PROMPT)
    for end in (1, 4, 20, 29, 31, 60, 100, whole.index(b"\r\n\r\n") + 2, whole.index(b"{"), len(whole) - 1):
        yield Case(f"cut after {end}", whole[:end], SLOW)
    chunked = _BODY + AUTH + TE + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(PROMPT), PROMPT)
    for left in (2, 4, 5, 9, 20):
        yield Case(f"chunks cut by {left}", chunked[:-left], SLOW)
    expecting = _BODY + AUTH + b"Expect: 100-continue\r\nContent-Length: 30\r\n\r\n"
    yield Case("expects and says no more", expecting, frozenset({100, *SLOW}))
    yield Case("expects something else", expecting.replace(b"100-c", b"200-c"), SLOW)
    yield Case("nothing", b"", SLOW)


def _foreign() -> Iterator[Case]:
    for name, data in {
        "TLS": bytes.fromhex("16030100a5010000a10303") + b"\x5a" * 200,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n",
        "memcached": b"stats\r\n",
        "SMTP": b"EHLO example\r\n",
        "SIP": b"OPTIONS sip:a@b SIP/2.0\r\nVia: SIP/2.0/TCP a\r\n\r\n",
        "RDP": bytes.fromhex("030000130ee000000000000100080003000000"),
        "SMB": bytes.fromhex("000000a4ff534d4272") + bytes(100),
        "Postgres": bytes.fromhex("0000000804d2162f"),
        "DNS": bytes.fromhex("001c0001010000010000000000000776657273696f6e0462696e6400001000") + b"\x03",
        "PROXY": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET /health HTTP/1.1\r\n" + HOST + b"\r\n",
        "zeros": bytes(5000),
        "high": b"\xff" * 5000,
        "line noise": bytes(range(256)) * 8,
        "long line": b"A" * 100_000,
        "JSON": PROMPT,
        "HTML": b"<html>\r\n\r\n",
        "response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "newlines": b"\n" * 100,
    }.items():
        yield Case(f"foreign {name}", data)
