"""Corpus and tokenizer of the bundled toy checkpoint.

The text is the English prose that every CPython installation carries: the language reference in
`pydoc_data.topics`, and the docstrings and comment blocks of the standard library. Source files
are parsed with `ast` and `tokenize`; no module of the library is imported. The text belongs to
CPython and is covered by the PSF licence.

Kept are whole sentences of plain English in ASCII, one paragraph to a line. Code, doctests,
grammars, tables, signatures, markup, addresses, credits and licence notices are dropped. So is a
paragraph most of whose word sequences occurred before, in any document: what is held out is not a
copy of what is trained on.

The corpus is a function of the interpreter alone. Another Python version gives another corpus, and
so may another patch release or a distribution that moves standard modules into other packages;
`main` prints the SHA-256 that identifies it. The bundled checkpoint was trained on the text of
Python 3.11.

    python -m tools.toy_corpus checkpoints/toy/tokenizer.model
"""

import argparse
import ast
import hashlib
import inspect
import io
import pathlib
import platform
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator

import sentencepiece

# Tests, demonstrations, and what is not part of the library.
_SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "ensurepip", "pydoc_data", "dist-packages", "site-packages"}
    | {"idle_test", "test", "tests", "turtledemo"}
)

# Texts shorter than this, in characters, are labels more often than sentences.
_MIN_TEXT_LENGTH = 60

# Docstrings of one module are joined up to this length, in characters: a model trained on single
# docstrings learns to stop after a sentence.
_DOCUMENT_LENGTH = 600
_MIN_DOCUMENT_LENGTH = 200

# Number of words in the sequences that tell a repeated paragraph.
_SHINGLE_LENGTH = 6

_SHUFFLE_SEED = 0

_ASCII = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{NO-BREAK SPACE}": " ",
        "\N{BULLET}": "*",
    }
)

_RULE = re.compile(r"\s*[^\w\s]{3,}\s*")
# What may open an item of a list: a bullet, a number, or the name of what is described.
_ITEM_MARK = re.compile(
    r"(?:[-*+o]|\(?\d{1,2}[.)]|\([a-z]\)|[\"'*]*\w[\w.]*[\"'*]* --?|\w+:(?= [A-Z])|\w+_\w+:"
    r"|:[a-z]+[\w ]*:|\w+ (?= )) +(?=\S)"
)

# The term of a definition, or the line that introduces a list.
_TERM = re.compile(r"(?:\S+ ){0,2}[^\s.]+|.*:")

# Applied in this order: reStructuredText roles, literals, emphasis and references.
_MARKUP = (
    (re.compile(r":[a-z:]+:`[~!]?([^`<>]+)`"), r'"\1"'),
    (re.compile(r"``([^`]+)``"), r'"\1"'),
    (re.compile(r"`([^`']+)[`']"), r'"\1"'),
    (re.compile(r"\*\*([^*\s](?:[^*]*[^*\s])?)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([A-Za-z_][\w ./-]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<!\w)_([A-Za-z]+)_(?!\w)"), r"\1"),
    (re.compile(r" ?\[\d+\](?=[\s.,;:)]|$)"), ""),
    (re.compile(r"::$"), ":"),
)

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')])) (?=[\"'(]*[A-Z])")

_LICENCE = re.compile(r"[Cc]opyright|COPYRIGHT|\b[Ll]icen[cs]e|WARRANT|\([cC]\) ?\d")
_CREDIT = re.compile(
    r"\b[Aa]uthors?\b(?! of)|[Tt]hanks to\b|\bGuido\b|\bSoftware Foundation\b|\w@\w+\.\w"
    r"|\b(?:[Ww]ritten|[Cc]ontributed|[Mm]aintained|[Ii]nspired|[Pp]osted|[Pp]atch|[Aa]dapted) by\b"
    r"|\b(?:[Bb]y|from|with|[Cc]redits? to|due to) [A-Z][a-z]+ (?:[A-Z]\. |van )?[A-Z][a-z]+\b"
)
# A sentence with one of these is code, a reference to what is not there, or a note to self.
_UNWANTED = re.compile(
    r">>>|https?:|ftp:|www\.|@|::|\\|\$|%[sdr]|=|[{}<>|~^#`]|!!|\?\?|^:|\.\.\.$|:$"
    r"|\b(?:XXX|TODO|FIXME|HACK|SF)\b|\b[Bb]po\b|\bgh-\d|\b[Ii]ssues? ?\d|\b[Bb]ugs? ?\d"
    r"|^(?:New|Added|Changed|Deprecated|Removed) (?:in|since) (?:version|Python)\b|^See \S"
    r"|example above|above example|\b[Ss]ee (?:also|below|above|section|\w+\.py)\b"
)

_WORD = re.compile(
    r"[\"'(]*(?:[A-Za-z][a-z]*|[A-Z]{2,}s?|(?:[A-Z][a-z]+)+)(?:[-'/][A-Za-z][a-z]*)*"
    r"[\"')]*[.,;:!?]*[\"')]*"
)
_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "does",
        "each",
        "else",
        "for",
        "from",
        "has",
        "have",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "may",
        "must",
        "no",
        "not",
        "of",
        "on",
        "only",
        "or",
        "other",
        "same",
        "should",
        "so",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "we",
        "when",
        "where",
        "which",
        "will",
        "with",
        "you",
        "your",
    ]
)


def _library() -> pathlib.Path:
    """Returns the directory of the running interpreter's standard library.

    Raises:
      FileNotFoundError: The installation has no sources, as in a frozen or embedded one.
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise FileNotFoundError(
            f"{topics}: not found; the toy corpus is read from the sources of the standard "
            "library, so run this with a Python that is installed with them"
        )
    return library


def _topics(library: pathlib.Path) -> Iterator[list[str]]:
    """Yields the sections of each topic of the language reference."""
    source = (library / "pydoc_data" / "topics.py").read_bytes()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield re.split(r"^\S.*\n(?:\*{3,}|={3,}|-{3,}|~{3,}|\^{3,})$", text, flags=re.M)


def _docstrings(source: str) -> list[str]:
    """Returns the docstrings of a module, its classes and its functions, in source order."""
    with warnings.catch_warnings():
        # Some modules have invalid escape sequences in their docstrings.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def _comments(source: str) -> list[str]:
    """Returns the runs of comment lines that stand alone and share one indentation."""
    blocks: list[list[str]] = []
    expected = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type != tokenize.COMMENT or token.line[:column].strip():
            continue
        if (row, column) != expected:
            blocks.append([])
        blocks[-1].append(token.string.lstrip("#!"))
        expected = (row + 1, column)
    return ["\n".join(block) for block in blocks]


def _texts() -> Iterator[list[str]]:
    """Yields the texts of each topic, then of each module, in the order of their names."""
    library = _library()
    yield from _topics(library)
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    for path in sorted(paths, key=pathlib.PurePath.as_posix):
        if _SKIPPED_DIRECTORIES.isdisjoint(path.parts):
            with tokenize.open(library / path) as file:
                source = file.read()
            yield _docstrings(source)
            yield _comments(source)


def _paragraphs(text: str) -> list[tuple[str, str]]:
    """Splits a text into paragraphs and list items without markup, each on one line.

    Returns:
      `(separator, paragraph)` pairs; the separator from what precedes is one line end for an item
      of a list and an empty line for a paragraph.
    """
    blocks = [("\n\n", "")]
    indent = 0
    for line in inspect.cleandoc(text.translate(_ASCII)).split("\n"):
        content = line.strip()
        separator, block = blocks[-1]
        mark = _ITEM_MARK.match(content)
        is_deeper = len(line) - len(line.lstrip()) > indent
        if not content:
            blocks.append(("\n\n", ""))
        elif _RULE.fullmatch(content):
            # A rule of symbols closes a table or underlines the heading above it.
            blocks[-1] = ("\n\n", "")
        elif not block or mark or (is_deeper and _TERM.fullmatch(block)):
            blocks.append(
                ("\n" if block else separator, content[mark.end() :] if mark else content)
            )
            indent = len(line) - len(line.lstrip())
        elif re.search(r"[a-z]-$", block):
            blocks[-1] = (separator, block + content)
        else:
            blocks[-1] = (separator, f"{block} {content}")
    return [(separator, _plain(block)) for separator, block in blocks if block]


def _plain(block: str) -> str:
    """Removes markup and makes a sentence of a fragment: a capital, a full stop."""
    block = " ".join(block.split())
    for pattern, replacement in _MARKUP:
        block = pattern.sub(replacement, block)
    if re.match(r"[a-z]+,? [a-z]", block):
        block = block[0].upper() + block[1:]
    last_word = re.search(r"(\w+)[\"')]*$", block)
    if last_word and last_word[1] not in _FUNCTION_WORDS:
        block += "."
    return block


def _sentences(paragraph: str) -> str:
    """Returns the usable sentences of a paragraph; nothing if they are the smaller part of it."""
    if _CREDIT.search(paragraph):
        return ""
    sentences = _SENTENCE_END.split(paragraph)
    kept = " ".join(part for part in sentences if not _UNWANTED.search(part))
    return kept if 2 * len(kept) > len(paragraph) else ""


def _is_prose(paragraph: str) -> bool:
    """Tells whether a paragraph is plain English in ASCII, from a capital to a full stop."""
    if not paragraph.isascii() or not paragraph.isprintable():
        return False
    if not re.match(r"[\"'(]*[A-Z\"']|[\w.]+\(\) ", paragraph):
        return False
    if not re.search(r"[.!?][\"')]*$", paragraph):
        return False
    if paragraph.count("(") != paragraph.count(")") or paragraph.count('"') % 2:
        return False
    words = paragraph.split()
    plain = sum(_WORD.fullmatch(word) is not None for word in words)
    function = sum(word.strip("\"'(),.;:").lower() in _FUNCTION_WORDS for word in words)
    return len(words) >= 5 and plain >= 0.8 * len(words) and function >= 0.15 * len(words)


def _prose(text: str) -> list[tuple[str, str]]:
    """Returns the paragraphs of plain English in a text, as `_paragraphs` does."""
    if _LICENCE.search(text):
        return []
    result = []
    previous = False
    for separator, paragraph in _paragraphs(text):
        sentences = _sentences(paragraph)
        # The list an item belongs to starts with the first item that is kept.
        separator = separator if previous else "\n\n"
        previous = _is_prose(sentences)
        if previous:
            result.append((separator, sentences))
    return result


def _unrepeated(paragraphs: Iterable[tuple[str, str]], seen: set[str]) -> str:
    """Joins the paragraphs fewer than half of whose word sequences are in `seen`; adds to it."""
    result = ""
    for separator, paragraph in paragraphs:
        words = re.findall(r"[a-z0-9]+", paragraph.lower())
        count = max(1, len(words) - _SHINGLE_LENGTH + 1)
        shingles = {" ".join(words[start : start + _SHINGLE_LENGTH]) for start in range(count)}
        if 2 * len(shingles & seen) < len(shingles):
            result += separator + paragraph
        seen |= shingles
    return result.lstrip("\n")


def documents() -> list[str]:
    """Gathers the corpus from the running interpreter's standard library.

    A document is one or more consecutive texts of one topic or module, about 600 characters or
    more. Its paragraphs are single lines with an empty line between them; the items of a list
    follow each other without one.

    Returns:
      The documents, sorted by source and then shuffled with a fixed seed: the end of the list is
      a fair sample of the whole.

    Raises:
      FileNotFoundError: The interpreter is installed without the sources of its library.
    """
    seen: set[str] = set()
    result = []
    for texts in _texts():
        group: list[str] = []
        for text in texts:
            addition = _unrepeated(_prose(text), seen)
            if len(addition) < _MIN_TEXT_LENGTH:
                continue
            if group and len(group[-1]) < _DOCUMENT_LENGTH:
                group[-1] += "\n\n" + addition
            else:
                group.append(addition)
        if len(group) > 1 and len(group[-1]) < _MIN_DOCUMENT_LENGTH:
            remainder = group.pop()
            group[-1] += "\n\n" + remainder
        result += [document for document in group if len(document) >= _MIN_DOCUMENT_LENGTH]
    random.Random(_SHUFFLE_SEED).shuffle(result)
    return result


def split(documents: list[str], held_out: float = 0.05) -> tuple[list[str], list[str]]:
    """Splits the corpus into training and held-out documents.

    Args:
      documents: As returned by `documents`; any order is kept.
      held_out: Fraction of the bytes to hold out, from the end of the list; rounded up to whole
        documents.

    Returns:
      `(train, held_out)`, which together are `documents`.

    Raises:
      ValueError: `held_out` is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}, expected a fraction between 0 and 1")
    missing = held_out * _num_bytes(documents)
    start = len(documents)
    while missing > 0:
        start -= 1
        missing -= len(documents[start].encode())
    return documents[:start], documents[start:]


def train_tokenizer(
    documents: Iterable[str], path: str | pathlib.Path, vocab_size: int = 1280
) -> None:
    """Trains a SentencePiece model of the kind that Grok-1 uses and writes it.

    Byte-pair encoding with byte fallback, no normalisation, single digits; `[PAD]`, `[BOS]`,
    `[EOS]` and `[UNK]` are 0 to 3 as in the released tokenizer.

    Args:
      documents: The training documents only: held-out text must not shape the vocabulary.
      path: The file to write; its directory is made if needed.
      vocab_size: Number of pieces, 256 of which are bytes.
    """
    model = io.BytesIO()
    # From an iterator and to a buffer: SentencePiece stores the names of its files in the model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", "\n\n", *"0123456789"],
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        unk_surface="[UNK]",
        # A longer document would be left out without a word.
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=1,
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def _num_bytes(documents: Iterable[str]) -> int:
    """Returns the size of the documents in UTF-8."""
    return sum(len(document.encode()) for document in documents)


def main() -> None:
    """Trains the tokenizer, writes it, and prints the figures of the corpus."""
    parser = argparse.ArgumentParser(description="Trains the tokenizer of the toy checkpoint.")
    parser.add_argument("tokenizer", type=pathlib.Path, help="the SentencePiece model to write")
    path = parser.parse_args().tokenizer

    corpus = documents()
    train, held_out = split(corpus)
    train_tokenizer(train, path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))

    print(f"Python {platform.python_version()}")
    print(f"corpus SHA-256 {hashlib.sha256(chr(0).join(corpus).encode()).hexdigest()}")
    print(f"tokenizer SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    for name, part in (("train", train), ("held out", held_out)):
        num_bytes = _num_bytes(part)
        num_tokens = sum(len(ids) for ids in tokenizer.encode(part))
        print(
            f"{name}: {len(part)} documents, {num_bytes} bytes, {num_tokens} tokens, "
            f"{num_bytes / num_tokens:.3f} bytes per token"
        )


if __name__ == "__main__":
    main()
