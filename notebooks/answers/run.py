"""Runs notebooks with the authors' answers instead of the blanks: make test-answers ARGS="05 12".

Nothing is written. It fails on the first error, and on an answer of which `check` doesn't say that it is right.
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def answers(stem: str) -> list[list[str]]:
    """Returns the blocks of code of each exercise: the answer, and what of the notebook shows it."""
    text = (FOLDER / "answers" / f"{stem}.md").read_text(encoding="utf-8")
    return [BLOCK.findall(part) for part in re.split(r"^## \d+$", text, flags=re.MULTILINE)[1:]]


def with_answers(path: Path) -> Any:
    """Returns the notebook with its blanks filled."""
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    for cell, blocks in zip(cells, answers(path.stem), strict=True):
        imports = "from exercises import check\n" if "from exercises" in cell.source else ""
        check = cell.source[cell.source.rindex("check(") :]
        cell.source = "\n".join([imports, *blocks[1:], blocks[0], check])
    return notebook


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


for path in sorted(FOLDER.glob("*.ipynb")):
    if sys.argv[1:] and path.stem[:2] not in sys.argv[1:]:
        continue
    notebook = with_answers(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    cells = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    wrong = [printed(cell) for cell in cells if not printed(cell).rstrip().endswith("right")]
    print(f"{path.stem}: {len(cells) - len(wrong)} of {len(cells)} answers right", *wrong, sep="\n  ")
    if wrong:
        sys.exit(1)
