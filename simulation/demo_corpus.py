"""What the demo model reads: short, self-contained pieces of the running Python's own library.

Every document is one function, method or class, dedented, short enough to end by itself. Chat
conversations are derived from the same pieces and nothing else. No network, no torch.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_CHARS = 60
MAX_CHARS = 620
MIN_CHARS_UNDOCUMENTED = 120
MAX_LINE_CHARS = 100
HELD_OUT_ONE_IN = 50
# Tests and third-party code are left out; so are tables that are data rather than prose or code.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You write short Python functions.",
    "You are a coding assistant. Answer with code.",
)
OPEN_PROMPTS = (
    "Hello!",
    "Hi, can you help me?",
    "Write some Python.",
    "Show me an example.",
    "Give me a short piece of code.",
    "What can you do?",
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One definition that ends by itself."""

    name: str
    kind: str
    """``function``, ``method`` or ``class``: the noun that a chat request uses."""
    summary: str
    """First sentence of the docstring, without its full stop; empty if there is none."""
    source: str

    @property
    def held_out(self) -> bool:
        """Whether the document is kept for measuring, by its own hash: stable across runs."""
        digest = hashlib.sha256(self.source.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Corpus:
    """All documents, in a fixed order, and how many files they come from."""

    documents: tuple[Document, ...]
    files: int

    @property
    def sha256(self) -> str:
        """Identifies the text: equal digests mean equal training data."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.source.encode() + b"\x00")
        return digest.hexdigest()


def standard_library() -> Path:
    """Where the running interpreter keeps its own sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(root: Path) -> Corpus:
    """Every distinct short definition under ``root``, ordered by path and line."""
    documents: dict[str, Document] = {}
    files = 0
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # lib2to3 and others keep deliberately broken samples
        files += 1
        for document in definitions(text, tree):
            documents.setdefault(document.source, document)
    return Corpus(tuple(documents.values()), files)


def definitions(text: str, tree: ast.Module) -> Iterator[Document]:
    """The definitions of one file that are short enough, in source order."""
    lines = text.expandtabs(8).splitlines()
    methods = {
        child
        for item in ast.walk(tree)
        if isinstance(item, ast.ClassDef)
        for child in item.body
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    found = [item for item in ast.walk(tree) if isinstance(item, Definition)]
    for item in sorted(found, key=lambda item: (item.lineno, item.col_offset)):
        source = _extract(lines, item)
        if _acceptable(source, documented=ast.get_docstring(item) is not None):
            kind = "class" if isinstance(item, ast.ClassDef) else "function"
            kind = "method" if item in methods else kind
            yield Document(item.name, kind, _first_sentence(ast.get_docstring(item)), source)


def _extract(lines: Sequence[str], item: Definition) -> str:
    """The dedented source of ``item``; a docstring that makes it too long keeps its first line."""
    start = min([item.lineno, *(decorator.lineno for decorator in item.decorator_list)]) - 1
    end = item.end_lineno or item.lineno
    source = _tidy(lines[start:end])
    summary = _first_sentence(ast.get_docstring(item))
    if len(source) <= MAX_CHARS or not summary or '"' in summary or "\\" in summary:
        return source
    docstring = item.body[0]
    before = lines[start : docstring.lineno - 1]
    after = lines[docstring.end_lineno or docstring.lineno : end]
    while after and not after[0].strip():
        after = after[1:]
    return _tidy([*before, " " * docstring.col_offset + f'"""{summary}."""', *after])


def _tidy(lines: Sequence[str]) -> str:
    """Dedented text without trailing blanks; ends in one newline."""
    stripped = "\n".join(line.rstrip() for line in lines)
    return textwrap.dedent(stripped).strip() + "\n"


def _acceptable(source: str, *, documented: bool) -> bool:
    """Long enough to say something, short enough to end soon, and still Python on its own."""
    least = MIN_CHARS if documented else MIN_CHARS_UNDOCUMENTED
    if not least <= len(source) <= MAX_CHARS:
        return False
    if max(map(len, source.splitlines())) > MAX_LINE_CHARS:
        return False
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def _first_sentence(docstring: str | None) -> str:
    """The first sentence of the first paragraph, on one line, without its full stop."""
    paragraph = (docstring or "").strip().split("\n\n", 1)[0]
    sentence = " ".join(paragraph.split()).split(". ", 1)[0].rstrip(".").strip()
    return sentence if 8 <= len(sentence) <= 160 else ""


def _request_for(document: Document, choose: random.Random) -> str:
    """What a user could have asked to get ``document``."""
    if choose.random() < 0.06:
        return choose.choice(OPEN_PROMPTS)
    noun = choose.choice((document.kind, f"Python {document.kind}", f"short {document.kind}"))
    named = f"{choose.choice(('Write', 'Please write', 'Write me'))} a {noun} `{document.name}`"
    if not document.summary or choose.random() < 0.35:
        return f"{named}."
    head, _, rest = document.summary.partition(" ")
    task = f"{head[:1].lower()}{head[1:]} {rest}".strip() if head[1:].islower() else ""
    wanted = f"Write a {noun}" if choose.random() < 0.6 else named
    if not task:
        return f"{wanted}: {document.summary}."
    return f"{wanted} {'that' if head.endswith('s') else 'to'} {task}."


def conversation(document: Document, choose: random.Random) -> list[Message]:
    """One exchange, sometimes under a system prompt, sometimes about what a name is for."""
    messages = []
    if choose.random() < 0.3:
        messages.append({"role": "system", "content": choose.choice(SYSTEM_PROMPTS)})
    if document.summary and choose.random() < 0.08:
        messages.append({"role": "user", "content": f"What is `{document.name}` for?"})
        messages.append({"role": "assistant", "content": f"{document.summary}."})
        messages.append({"role": "user", "content": "Show me the code."})
    else:
        messages.append({"role": "user", "content": _request_for(document, choose)})
    messages.append({"role": "assistant", "content": document.source})
    return messages
