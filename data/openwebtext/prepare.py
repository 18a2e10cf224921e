"""OpenWebText, or any corpus of documents, in GPT-2's BPE: writes train.bin, val.bin and meta.json.

    python data/openwebtext/prepare.py [--source=hub|PATH[,PATH...]] [--val_fraction=0.0005] [--num_proc=N] [--out_dir=DIR]

--source=
    hub     the parquet files of Skylion007/openwebtext, through the packages of requirements-data.txt (needs the network and about 100 GB)
    PATH    files or folders, comma-separated, in any mix; folders with all that is below them, names sorted. (A path that has a comma in it
            works when it is the only one, and a folder that is called `hub` is ./hub.)
            .jsonl, .jsonl.xz, .jsonl.zst, .jsonl.gz    one JSON object a line, its string "text" is a document
            .parquet                                    the column "text"
            .txt                                        each file is one document
            .tar, .xz                                   the original urlsf_subset* shards: tars of .txt files, and of .xz-packed tars of
                                                        .txt files; also the whole openwebtext.tar.xz

Documents are taken as they are. (The hub's copy of the original shards has runs of empty lines shortened and both ends stripped.)
<|endoftext|> (50256) follows each one; where that word stands in a document it is ordinary text. What is not text is left out, counted by
reason and named in meta.json and on stdout. The split and the order are nanoGPT's: see ORDER_RULE in corpus.py, which also goes into
meta.json. From the same documents in the same order come the very bytes of nanoGPT's train.bin and val.bin.

A run that was killed goes on where it was when the same command is given again. Memory stays below 1.5 GiB with a few processes (a worker
has about 0.1 GiB), whatever the corpus; the disk needs three times the size of the result in --out_dir meanwhile.

The hub. That data set has no parquet files of its own that this script could name for sure, but the hub keeps a parquet form of every public
set in the branch refs/convert/parquet, so that is the default of --revision. A branch may move: it is resolved to a commit, exactly that one
is read, and it is written into meta.json with the sha256 of every file; to get the same again give that commit as --revision. The hub may
hold only the first part of a large set in that branch, so the number of documents is compared with the 8,013,769 that are known. This
path was written on a machine that cannot reach the hub. It was tried on stand-ins only (tests/test_text_corpora.py).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import InputError, configure, one_line_errors  # noqa: E402  (numpy and tiktoken are imported where they are used)
from corpus import MAX_DOCUMENT, NO_TEXT, TOO_LARGE, VAL_FRACTION, Files, GPT2Encoder, grouped, optional, write_corpus  # noqa: E402

HUB = "Skylion007/openwebtext"
HUB_DOCUMENTS = 8_013_769


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare OpenWebText or another corpus in GPT-2's BPE: python data/openwebtext/prepare.py [--key=value ...]"""

    source: str = "hub"  # hub, or files and folders, comma-separated
    revision: str = "refs/convert/parquet"  # of the hub's data set: a branch or a commit
    num_proc: int = 0  # worker processes; 0: one per core
    val_fraction: float = VAL_FRACTION  # share of the documents that val.bin holds; raise it for a small corpus
    out_dir: str = ""  # directory for the files; empty: the one of this script

    def check(self) -> "PrepareConfig":
        if not self.source:
            raise InputError("--source is empty: give hub, or files and folders, comma-separated")
        if not 0 <= self.num_proc <= 256:
            raise InputError(f"--num_proc={self.num_proc} must lie between 0 (one per core) and 256")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"--val_fraction={self.val_fraction:g} must lie between 0 and 1")
        return self


class Hub:
    """The documents of the hub's data set; see corpus.Files for what is asked of it."""

    def __init__(self, revision: str):
        datasets = optional("datasets", "--source=hub")
        hub = optional("huggingface_hub", "--source=hub")
        self.read = 0
        try:
            info = hub.HfApi().dataset_info(HUB, revision=revision, files_metadata=True, timeout=30)
            files = {file.rfilename: file for file in info.siblings if file.rfilename.endswith(".parquet")}
            names = sorted(files)
            if not names:
                raise InputError(f"{HUB} has no parquet files at --revision={revision}: give another one")
            addresses = [f"hf://datasets/{HUB}@{info.sha}/{name}" for name in names]
            self.rows = datasets.load_dataset("parquet", data_files={"train": addresses}, split="train")
        except InputError:
            raise
        except Exception as error:  # network, hub, disk: the packages name no common class
            cause = " ".join(str(error).split())[:150]
            raise InputError(
                f"{HUB} at --revision={revision} cannot be had ({type(error).__name__}: {cause}); fetch its files by another way, --source=PATH"
            ) from None
        if len(self.rows) != HUB_DOCUMENTS:
            raise InputError(f"{HUB} at --revision={revision} has {len(self.rows):,} documents and not {HUB_DOCUMENTS:,}: give another revision")
        self.size = sum(files[name].size or 0 for name in names) or 1
        listed = [{"name": name, "bytes": files[name].size, "sha256": getattr(files[name].lfs, "sha256", None)} for name in names]
        self.description = [{"name": HUB, "revision": revision, "commit": info.sha, "files": len(names), "bytes": self.size, "first_files": listed}]

    def _documents(self):
        for first in range(0, len(self.rows), 64):
            for row, text in enumerate(self.rows[first : first + 64]["text"], first):
                content = NO_TEXT if text is None else text.encode(errors="surrogatepass")
                yield f"{HUB}:{row}", content if isinstance(content, str) or len(content) <= MAX_DOCUMENT else TOO_LARGE
            self.read = self.size * (row + 1) // len(self.rows)

    def blocks(self, cursor=(0, 0)):
        """Yields (cursor, block)."""
        for index, block in enumerate(grouped(self._documents(), HUB)):
            if index >= cursor[1]:
                yield (0, index + 1), block


def prepare(config: PrepareConfig):
    """Gets the documents and writes the files. Raises InputError; the files are then as they were."""
    if config.source == "hub":
        GPT2Encoder()  # a missing vocabulary is told before anything is fetched, and
        source = Hub(config.revision)
    else:
        whole = Path(config.source)
        source = Files([whole] if whole.exists() else [Path(path) for path in config.source.split(",") if path])
        GPT2Encoder()  # before anything is read
    write_corpus(source, Path(config.out_dir) if config.out_dir else HERE, config.num_proc, val_fraction=config.val_fraction)


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
