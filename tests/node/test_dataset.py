"""From text to samples: every kind of file, one line for every bad row, tokens made once, windows read exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mycel.node.text import TextCodec
from mycel.node.training import documents, token_file
from mycel.node.training.dataset import TokenDataset, open_dataset, with_files
from mycel.node.training.documents import read_pieces
from mycel.node.training.sources import find_sources, python_topics, total_bytes
from mycel.node.training.token_file import Framing, framing, make_token_file
from mycel.protocols.errors import ConfigError
from mycel.swarm.training.recipe import DataPart, Recipe, StepPart
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

EOS = 257
TEXTS = ["one two three", "Ünïcode ☃ and\nlines", "last"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", n_blocks=1))


def documents_of(base: Path, **part: object) -> list[str]:
    """What the data part reads, pieces joined."""
    found: list[str] = []
    begins = True
    for source in find_sources(DataPart(**part), base):
        for piece in read_pieces(source):
            found = [*found, piece.text] if begins else [*found[:-1], found[-1] + piece.text]
            begins = piece.ends
        assert begins
    return found


def refusal(base: Path, **part: object) -> str:
    with pytest.raises(ConfigError) as caught:
        documents_of(base, **part)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---- every kind of file


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts), "utf-8")


def write_parquet(path: Path, texts: Sequence[object], field: str = "text", **options: object) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": list(range(len(texts))), field: list(texts)})
    pq.write_table(table, path, row_group_size=2, **options)


def write_dataset(directory: Path, shards: Sequence[Sequence[str]], *, as_file: bool = False) -> None:
    """The layout of `Dataset.save_to_disk`."""
    import pyarrow as pa

    directory.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pa.table({"id": list(range(len(texts))), "text": list(texts)})
        opened = (pa.ipc.new_file if as_file else pa.ipc.new_stream)(str(directory / name), table.schema)
        with opened as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (directory / "state.json").write_text(json.dumps(state))


def test_a_text_file_is_a_document(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "3.txt").write_bytes(b"")
    (tmp_path / "4.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert documents_of(tmp_path, files=("*.txt",)) == [*TEXTS, "marked"]


@pytest.mark.parametrize("field", ["text", "body"])
def test_jsonl_has_a_document_a_line(tmp_path, field):
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, ""], field)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"\n  \r\n" + json.dumps({field: "no newline at the end"}).encode())
    assert documents_of(tmp_path, files=("a.jsonl",), field=field) == [*TEXTS, "no newline at the end"]


@pytest.mark.parametrize("options", [{}, {"use_dictionary": True, "compression": "zstd"}])
def test_parquet_has_a_document_a_row(tmp_path, options):
    write_parquet(tmp_path / "a.parquet", TEXTS, **options)
    assert documents_of(tmp_path, files=("a.parquet",)) == TEXTS


@pytest.mark.parametrize("as_file", [False, True])
def test_a_dataset_directory_is_read_in_its_own_order(tmp_path, as_file):
    write_dataset(tmp_path / "corpus", [TEXTS, ["more"]], as_file=as_file)
    assert documents_of(tmp_path, files=("corpus",)) == [*TEXTS, "more"]
    assert documents_of(tmp_path, files=("corpus",), kind="dataset") == [*TEXTS, "more"]


def test_the_help_topics_of_python(tmp_path):
    found = documents_of(tmp_path, kind="python-topics")
    assert found == [text for _, text in sorted(python_topics().items())]
    assert len(found) > 50


def test_files_come_in_the_order_of_patterns_and_names_and_each_once(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.md", "deep/d.jsonl", "deep/e.csv", "deep/.hidden/f.txt", "[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}' if name.endswith("jsonl") else name)
    assert documents_of(tmp_path, files=("b.txt", "?.txt", "./a.txt")) == ["b.txt", "a.txt"]
    assert documents_of(tmp_path, files=("deep",)) == ["deep/d.jsonl", "deep/er/c.md"]
    assert documents_of(tmp_path, files=("deep",), kind="text") == ["deep/er/c.md"]
    assert documents_of(tmp_path, files=("**/*.md", "[1].txt")) == ["deep/er/c.md", "[1].txt"]
    assert documents_of(tmp_path / "deep", files=("../a.txt", str(tmp_path / "b.t*"))) == ["a.txt", "b.txt"]
    assert documents_of(tmp_path, files=("deep/e.csv",), kind="text") == ["deep/e.csv"]
    odd = tmp_path / "od[d]"
    odd.mkdir()
    (odd / "g.txt").write_text("found")
    assert documents_of(odd, files=("*.txt",)) == ["found"]


# ---- what cannot be read


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("*.txt",), "data.files: there is no text file '*.txt', seen from "),
        (("empty",), "data.files: there is no text file 'empty'"),
        (("x.csv",), "x.csv: its name does not say of what kind it is: say data.kind"),
        (("odd",), "odd is a selection of rows of another dataset"),
        (("parts",), "parts has several parts (train, test): name the one to train on, parts/PART"),
        (("escapes",), "state.json is damaged: it does not list its data files"),
    ],
)
def test_files_that_are_not_what_is_wanted(tmp_path, files, expected):
    (tmp_path / "x.csv").write_text("a,b")
    for folder, name, content in (
        ("odd", "state.json", {"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}),
        ("parts", "dataset_dict.json", {"splits": ["train", "test"]}),
        ("escapes", "state.json", {"_data_files": [{"filename": "../x.csv"}]}),
        ("empty", ".hidden", {}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(content))
    assert expected in refusal(tmp_path, files=files)


def test_a_kind_that_files_are_not(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("text")
    assert "plain is not a dataset directory" in refusal(tmp_path, files=("plain",), kind="dataset")
    assert "cannot read" in refusal(tmp_path, files=("plain/a.txt",), kind="parquet")
    assert "there is no parquet file 'plain'" in refusal(tmp_path, files=("plain",), kind="parquet")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2: no field 'text': data.field says where the text is"),
        (b'\n\n{"text": 3}', "line 3: 'text' is not text"),
        (b'{"text": null}', "line 1: 'text' is empty"),
        (b'{"text": "a"}\n["text"]', "line 2: no field 'text'"),
        (b'{"text": "a"}\n{"text": "b"', "line 2: not valid JSON"),
        (b'{"text": "\\ud800"}', "line 1: not valid JSON"),
        (b'{"text": "\xff"}', "line 1: not valid UTF-8"),
        (b"[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, expected):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert f"a.jsonl, {expected}" in refusal(tmp_path, files=("a.jsonl",))


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(b" " * 2**22)
    assert "a.jsonl, line 1: longer than 1 MiB" in refusal(tmp_path, files=("a.jsonl",))


@pytest.mark.parametrize("block_bytes", [1, 3, 1000])
def test_bytes_that_are_no_text_are_named_by_line(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(documents, "_BLOCK_BYTES", block_bytes)
    (tmp_path / "a.txt").write_bytes("é\né\nab".encode() + b"\xe2\x98c\n")
    assert "a.txt, line 3: not valid UTF-8" in refusal(tmp_path, files=("a.txt",))
    (tmp_path / "b.txt").write_bytes("é\né".encode()[:-1])
    assert "b.txt, line 2: not valid UTF-8" in refusal(tmp_path, files=("b.txt",))


@pytest.mark.parametrize(
    ("rows", "field", "expected"),
    [
        (["a", "b", None], "text", "row 3: 'text' is empty"),
        ([1, 2], "text", "row 1: 'text' is not text"),
        (["a"], "body", "no field 'text': data.field says where the text is (there is id, body)"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, field, expected):
    write_parquet(tmp_path / "a.parquet", rows, field)
    message = refusal(tmp_path, files=("a.parquet",))
    assert "a.parquet" in message
    assert expected in message


def test_rows_that_are_not_utf8_and_damaged_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: not valid UTF-8" in refusal(tmp_path, files=("a.parquet",))
    write_parquet(tmp_path / "b.parquet", TEXTS)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    assert "b.parquet" in refusal(tmp_path, files=("b.parquet",))
    write_dataset(tmp_path / "c", [TEXTS])
    (tmp_path / "c" / "data-00000-of-00001.arrow").write_bytes(b"not arrow at all")
    assert "data-00000-of-00001.arrow" in refusal(tmp_path, files=("c",))


def test_without_pyarrow_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    assert 'pip install "mycel[train]"' in refusal(tmp_path, files=("a.parquet",))


# ---- long documents


def test_a_long_document_comes_in_pieces_cut_before_lines_and_words(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 10)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 7)
    (tmp_path / "a.txt").write_text("one\ntwo three four five\nsix seven 0123456789ab")
    found = list(read_pieces(*find_sources(DataPart(files=("a.txt",)), tmp_path)))
    # A line is a better place than a word, and a word than none.
    assert [piece.text for piece in found] == ["one", "\ntwo three", " four five", "\nsix seven", " 012345678", "9ab"]
    assert [piece.ends for piece in found] == [False] * 5 + [True]


def test_the_same_document_has_the_same_pieces_from_any_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 50)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 16)
    text = "\n".join(f"line {i} of a long text, with ☃ in it" for i in range(40))
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "a.jsonl", [text])
    write_parquet(tmp_path / "a.parquet", [text])
    write_dataset(tmp_path / "a", [[text]])
    found = [
        [piece.text for piece in read_pieces(*find_sources(DataPart(files=(name,)), tmp_path))]
        for name in ("a.txt", "a.jsonl", "a.parquet", "a")
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert "".join(found[0]) == text
    assert len(found[0]) > 20


def test_progress_ends_at_the_size_of_the_files(tmp_path, monkeypatch, model):
    monkeypatch.setattr(token_file, "_BATCH_CHARS", 200)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("word " * 300)
    write_jsonl(tmp_path / "c.jsonl", ["word " * 30] * 10)
    write_parquet(tmp_path / "d.parquet", ["word " * 30] * 10)
    write_dataset(tmp_path / "e", [["word " * 30] * 5] * 2)
    files = ("a.txt", "b.txt", "c.jsonl", "d.parquet", "e")
    seen: list[tuple[int, int]] = []
    open_dataset(recipe(*files), model, tmp_path, tmp_path / "cache", lambda *now: seen.append(now))
    total = total_bytes(find_sources(DataPart(files=files), tmp_path))
    assert seen[-1] == (total, total)
    assert len(seen) > 10
    assert seen == sorted(seen)


# ---- tokens


def recipe(*files: str, sequence: int = 8, **data: object) -> Recipe:
    return Recipe(name="r", data=DataPart(files=files, sequence=sequence, **data), step=StepPart(steps=1), seed=3)


def stream(file: token_file.TokenFile) -> list[int]:
    width = file.width_bytes
    data = file.path.read_bytes()
    return [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]


def made(base: Path, model: Path, *files: str, vocab_size: int = 260) -> token_file.TokenFile:
    codec = TextCodec.load(model, 260)
    sources = find_sources(DataPart(files=files), base)
    return make_token_file(sources, codec, framing(codec, model), vocab_size, base / "cache")


@pytest.mark.parametrize(("vocab_size", "width"), [(260, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_documents_are_joined_by_the_end_of_text(tmp_path, model, vocab_size, width):
    write_jsonl(tmp_path / "a.jsonl", ["ab", "c"])
    file = made(tmp_path, model, "a.jsonl", vocab_size=vocab_size)
    codec = TextCodec.load(model, 260)
    assert stream(file) == [*codec.encode("ab"), EOS, *codec.encode("c"), EOS]
    assert (file.n_tokens, file.width_bytes) == (5, width)


def test_a_document_in_pieces_is_one_document(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 10)
    monkeypatch.setattr(token_file, "_BATCH_CHARS", 15)
    texts = ["some words in a row " * 3, "x", "more of them " * 4]
    write_jsonl(tmp_path / "a.jsonl", texts)
    codec = TextCodec.load(model, 260)
    assert stream(made(tmp_path, model, "a.jsonl")) == [token for text in texts for token in (*codec.encode(text), EOS)]


def tokenizer_with(directory: Path, model: Path, *, bos: str | None, eos: str | None, begins: bool) -> Path:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    # A tokenizer's own limits are for models that read short texts.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    return directory


@pytest.mark.parametrize(
    ("bos", "eos", "begins", "expected"),
    [
        ("<s>", "</s>", False, Framing((), (257,))),
        ("<s>", "</s>", True, Framing((256,), (257,))),
        ("<s>", "<s>", True, Framing((256,), ())),
        ("<s>", None, True, Framing((256,), ())),
        (None, "</s>", True, Framing((), (257,))),
    ],
)
def test_the_frame_is_what_the_tokenizer_does_to_texts(tmp_path, model, bos, eos, begins, expected):
    directory = tokenizer_with(tmp_path / "t", model, bos=bos, eos=eos, begins=begins)
    codec = TextCodec.load(directory, 260)
    assert framing(codec, directory) == expected
    write_jsonl(tmp_path / "a.jsonl", ["a longer text", "b"])
    file = make_token_file(find_sources(DataPart(files=("a.jsonl",)), tmp_path), codec, expected, 260, tmp_path / "c")
    plain = TextCodec.load(model, 260)
    assert stream(file) == [
        token for text in ("a longer text", "b") for token in (*expected.before, *plain.encode(text), *expected.after)
    ]


def test_the_model_says_what_ends_a_text_where_the_tokenizer_does_not(tmp_path, model):
    directory = tokenizer_with(tmp_path / "t", model, bos=None, eos=None, begins=False)
    codec = TextCodec.load(directory, 260)
    with pytest.raises(ConfigError, match="names no token that ends a text"):
        framing(codec, directory)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 258}))
    assert framing(codec, directory) == Framing((), (258,))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    assert framing(codec, directory) == Framing((), (257,))


# ---- made once


def test_tokens_are_made_once_and_again_when_the_text_changes(tmp_path, model, monkeypatch):
    (tmp_path / "a.txt").write_text("some text of the first version")
    first = made(tmp_path, model, "a.txt")
    with monkeypatch.context() as patch:
        patch.setattr(token_file, "read_pieces", None)
        assert made(tmp_path, model, "a.txt") == first
    (tmp_path / "a.txt").write_text("some text of the other version")
    os.utime(tmp_path / "a.txt", ns=(0, 1))
    second = made(tmp_path, model, "a.txt")
    assert second.path != first.path
    assert second.fingerprint != first.fingerprint


def test_the_fingerprint_is_that_of_text_and_tokenizer_not_of_files(tmp_path, model):
    for name, texts in (("one/a.jsonl", TEXTS), ("two/b.jsonl", TEXTS), ("three/a.jsonl", TEXTS[::-1])):
        (tmp_path / name).parent.mkdir()
        write_jsonl(tmp_path / name, texts)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    prints = [made(tmp_path, model, *names).fingerprint for names in (("one",), ("two",), ("?.txt",), ("three",))]
    assert prints[0] == prints[1] == prints[2] != prints[3]


@pytest.mark.parametrize("harm", ["note", "tokens", "both"])
def test_a_damaged_cache_is_made_again(tmp_path, model, harm):
    (tmp_path / "a.txt").write_text("some text")
    first = made(tmp_path, model, "a.txt")
    good = first.path.read_bytes()
    if harm in ("note", "both"):
        first.path.with_suffix(".json").write_bytes(b"{")
    if harm in ("tokens", "both"):
        first.path.write_bytes(good[:-1])
    assert made(tmp_path, model, "a.txt") == first
    assert first.path.read_bytes() == good


def test_making_a_file_waits_for_who_makes_it_already(tmp_path, model, monkeypatch):
    """The second of two finds the file when its turn comes, and does not make it again."""
    (tmp_path / "a.txt").write_text("some text")
    first = made(tmp_path, model, "a.txt")
    looks = iter([None, first])
    monkeypatch.setattr(token_file, "_cached", lambda folder, key: next(looks))
    monkeypatch.setattr(token_file, "read_pieces", None)
    assert made(tmp_path, model, "a.txt") == first


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, model):
    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(KeyboardInterrupt):
        open_dataset(recipe("a.txt"), model, tmp_path, tmp_path / "cache", stop)
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]
    assert open_dataset(recipe("a.txt"), model, tmp_path, tmp_path / "cache").n_tokens == 10


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, model):
    (tmp_path / "a.txt").write_text("some text")
    first = made(tmp_path, model, "a.txt")
    left = first.path.with_name(f".{first.path.name}.abc.tmp")
    left.write_bytes(b"half")
    first.path.unlink()
    assert made(tmp_path, model, "a.txt") == first
    assert sorted(path.suffix for path in first.path.parent.iterdir()) == [".json", ".lock", ".tokens"]


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, model, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    read = read_pieces

    def read_and_write(source):
        yield from read(source)
        (tmp_path / "a.txt").write_text("some other text")

    monkeypatch.setattr(token_file, "read_pieces", read_and_write)
    with pytest.raises(ConfigError, match=r"a\.txt changed while it was read"):
        made(tmp_path, model, "a.txt")


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.skipif(sys.platform == "win32", reason="no lock that waits")
def test_of_several_processes_one_makes_the_file(tmp_path, model):
    write_jsonl(tmp_path / "a.jsonl", ["some words in a row " * 200] * 200)
    program = (
        "import sys; from pathlib import Path; from mycel.node.training import token_file;"
        "from mycel.node.training.dataset import open_dataset; from mycel.node.training.founding import read_recipe;"
        "made = []; write = token_file._write;"
        "token_file._write = lambda *a: (made.append(1), write(*a))[1];"
        "print('ready', flush=True); sys.stdin.readline();"
        "base, model = map(Path, sys.argv[1:]);"
        "d = open_dataset(read_recipe(base / 'r.toml'), model, base, base / 'cache');"
        "print(len(made), d.fingerprint())"
    )
    (tmp_path / "r.toml").write_text('name = "r"\n[data]\nfiles = ["a.jsonl"]\n[step]\nsteps = 1\n')
    command = [sys.executable, "-c", program, str(tmp_path), str(model)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(count for count, _ in said) == ["0", "1"]
    assert len({fingerprint for _, fingerprint in said}) == 1


# ---- samples


def dataset(tmp_path: Path, model: Path, n_chars: int, **settings: object) -> TokenDataset:
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(n_chars - 1)))
    return open_dataset(recipe("a.txt", **settings), model, tmp_path, tmp_path / "cache")


def test_an_epoch_makes_every_token_a_target_once(tmp_path, model):
    data = dataset(tmp_path, model, 83)
    assert (data.n_tokens, data.order.n_windows) == (83, 10)
    whole = stream(token_file.TokenFile(next(tmp_path.glob("cache/tokens/*.tokens")), 83, 2, ""))
    for epoch in (0, 1, 7):
        samples = data.tokens(10 * epoch, 10)
        assert samples.shape == (10, 9)
        assert samples.dtype == torch.int64
        windows = sorted((data.order.window(10 * epoch + i), row.tolist()) for i, row in enumerate(samples))
        assert [tokens for _, tokens in windows] == [whole[8 * w : 8 * w + 9] for w in range(10)]
    assert data.tokens(0, 10).tolist() != data.tokens(10, 10).tolist()
    assert data.tokens(95, 20).tolist() == data.tokens(95, 5).tolist() + data.tokens(100, 15).tolist()


def test_held_out_windows_are_never_drawn(tmp_path, model):
    data = dataset(tmp_path, model, 805, held_out=0.1)
    assert (data.n_held_out, data.order.n_train) == (10, 90)
    held_out = {data.order.held_out(i) for i in range(10)}
    assert not held_out & {data.order.window(i) for i in range(500)}
    assert data.held_out(2, 3).tolist() == [data.held_out(i, 1)[0].tolist() for i in (2, 3, 4)]
    with pytest.raises(IndexError):
        data.held_out(9, 2)


def test_a_small_fraction_holds_out_one_window(tmp_path, model):
    assert dataset(tmp_path, model, 83, held_out=0.001).n_held_out == 1


@pytest.mark.parametrize(("n_tokens", "held_out", "fits"), [(9, 0.0, True), (8, 0.0, False), (9, 0.1, False)])
def test_text_too_short_for_a_sample_is_refused(tmp_path, model, n_tokens, held_out, fits):
    if fits:
        assert dataset(tmp_path, model, n_tokens, held_out=held_out).tokens(5, 1).shape == (1, 9)
        return
    with pytest.raises(ConfigError, match=f"the text has {n_tokens} tokens, too few for one sample of 9"):
        dataset(tmp_path, model, n_tokens, held_out=held_out)


def test_a_text_of_nothing_is_refused(tmp_path, model):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match="the text has 0 tokens"):
        open_dataset(recipe("a.txt"), model, tmp_path, tmp_path / "cache")


def test_a_trainer_with_other_text_is_refused(tmp_path, model):
    data = dataset(tmp_path, model, 100)
    run = recipe(fingerprint=data.fingerprint())
    assert open_dataset(with_files(run, ("a.txt",)), model, tmp_path, tmp_path / "cache").fingerprint() in repr(run)
    (tmp_path / "a.txt").write_text("x" * 99)
    with pytest.raises(ConfigError, match="this is not the text of run r: its fingerprint is "):
        open_dataset(with_files(run, ("a.txt",)), model, tmp_path, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.files: must name the text"):
        open_dataset(run, model, tmp_path, tmp_path / "cache")


def test_wide_tokens_are_read_as_they_are(tmp_path):
    path = tmp_path / "wide.tokens"
    values = [0, 1, 70_000, 2**31 - 1, 5]
    path.write_bytes(b"".join(value.to_bytes(4, "little") for value in values))
    data = TokenDataset(token_file.TokenFile(path, 5, 4, ""), 4, 0)
    assert data.tokens(0, 1).tolist() == [values]


def test_a_tokenizer_of_another_model_is_refused(tmp_path, model):
    small = make_tiny_tokenizer(make_tiny_model("llama", tmp_path / "small", n_blocks=1, vocab_size=259))
    (tmp_path / "a.txt").write_text("some text of some length")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 258}))
    with pytest.raises(ConfigError, match="it has 259 tokens, the model 258"):
        open_dataset(recipe("a.txt"), small, tmp_path, tmp_path / "cache")
