"""The corpus: Python's standard library as text and as ChatML conversations, split by file."""

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
HELD_OUT_PERCENT = 4
# Left out: tests and installed packages; build data, which names the machine that built Python;
# character maps, which are tables; `topics`, which is read as a dictionary instead.
SKIPPED_FOLDERS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
SKIPPED_NAMES = ("_sysconfigdata*", "topics.py", "cp*.py", "mac_*.py", "iso8859*.py", "koi8*.py")
WORD = re.compile(r"(?<![^\W_])[A-Za-z]{3,9}(?![^\W_])")
QUESTIONS = (
    "What does `{name}` do?",
    "Document `{name}`.",
    "Explain `{name}{signature}`.",
    "Write the docstring of this function:\n```python\ndef {short}{signature}:\n```",
)


@dataclass(frozen=True)
class Document:
    """One text: a source file, a help topic, or a conversation made from a docstring."""

    name: str
    text: str
    kind: str  # "source", "topic" or "chat"

    @property
    def held_out(self) -> bool:
        """True for the files that training never sees; a file's conversations go with the file."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def chat(question: str, answer: str) -> str:
    """A one-turn conversation in ChatML, as the tokenizer's chat template writes it."""
    return (
        f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n{END_OF_TEXT}"
    )


def source_files() -> Iterator[tuple[str, str]]:
    """Every module of the standard library: its relative path and its text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in SKIPPED_FOLDERS for part in name.parts):
            continue
        if any(path.match(pattern) for pattern in SKIPPED_NAMES):
            continue
        yield name.as_posix(), path.read_text("utf-8", errors="ignore")


def documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str, str, str]]:
    """(full name, short name, signature, docstring) of every documented function and method."""
    owners = [(module, tree)]
    while owners:
        prefix, owner = owners.pop()
        for node in ast.iter_child_nodes(owner):
            if isinstance(node, ast.ClassDef):
                owners.append((f"{prefix}.{node.name}", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) < 2000:
                    signature = f"({ast.unparse(node.args)})"
                    yield f"{prefix}.{node.name}", node.name, signature, docstring


def conversations(path: str, text: str) -> Iterator[str]:
    """The file's docstrings as questions and answers; a hash of the name picks the question."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        tree = ast.parse(text)
    except SyntaxError:  # lib2to3 ships files in Python 2
        return
    for name, short, signature, docstring in documented(tree, module):
        choice = hashlib.sha256(name.encode()).digest()[0] % len(QUESTIONS)
        question = QUESTIONS[choice].format(name=name, short=short, signature=signature)
        yield chat(question, textwrap.dedent(docstring).strip())


def documents() -> list[Document]:
    """The whole corpus, in a fixed order."""
    out = []
    for path, text in source_files():
        out.append(Document(path, text + END_OF_TEXT, "source"))
        out += [Document(path, talk, "chat") for talk in conversations(path, text)]
    for topic, text in sorted(topics.topics.items()):
        out.append(Document(f"topics/{topic}", text.strip() + "\n" + END_OF_TEXT, "topic"))
    return out


def split(docs: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents."""
    return [d for d in docs if not d.held_out], [d for d in docs if d.held_out]


def words(docs: list[Document]) -> list[str]:
    """The different words of three to nine letters, in small letters, sorted."""
    found: set[str] = set()
    for doc in docs:
        found.update(word.lower() for word in WORD.findall(doc.text))
    return sorted(found)
