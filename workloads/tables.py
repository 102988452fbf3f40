"""HTML to TSV: a long page with several tables; write chosen columns of one of them as TSV.

Source of the task: LongProc. Attributes, other tables and paragraphs are what the answer must skip.
"""

import random
from collections.abc import Callable

from aquifer.workloads.prose import LEADS, Budget, coined_word, date, digits, filler, letters
from aquifer.workloads.tasks import CountTokens, Question, Sample, Split

_COLUMNS: dict[str, Callable[[random.Random, Split], str]] = {
    "Town": coined_word,
    "Owner": lambda rng, split: f"{coined_word(rng, split)} {coined_word(rng, split)}",
    "Code": lambda rng, split: f"{letters(rng, 2)}-{digits(rng, 4)}",
    "Count": lambda rng, split: digits(rng, rng.randint(2, 5)),
    "Since": lambda rng, split: date(rng),
    "Phone": lambda rng, split: f"{digits(rng, 3)} {digits(rng, 4)}",
}
_QUESTIONS = (
    "Write the table {caption} as TSV with the columns {columns}.",
    "Convert the table {caption} to TSV. Columns: {columns}.",
    "Give me the columns {columns} of the table {caption} as TSV.",
    "Return {columns} of table {caption} as TSV.",  # held out
)
_STYLES = (
    ("<tr>", "<td>", "</td>", "</tr>\n"),
    ('<tr class="row">', '<td class="cell">', "</td>", "</tr>\n"),
    ("<tr>\n", "  <td>", "</td>\n", "</tr>\n"),
)
_HEAD = "<html>\n<body>\n"
_FOOT = "</body>\n</html>\n"


def make_table(seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout") -> Sample:
    """A page of two or three tables between paragraphs, and one question about one of the tables.

    The answer is TSV with a header line. Prompt length as in `make_text2json`.
    Raises ValueError if `target_tokens` is too small for a page.
    """
    if target_tokens < 512:
        raise ValueError(f"target_tokens is {target_tokens}; a page of tables needs at least 512")
    rng = random.Random(f"table/{split}/{seed}")
    unseen = split == "heldout" and rng.random() < 0.3
    columns = rng.sample(list(_COLUMNS), k=rng.randint(3, 5))
    chosen = [column for column in columns if rng.random() < 0.6] or columns[:2]
    captions = _captions(rng, split, rng.randint(2, 3))
    question = rng.choice(LEADS) + rng.choice(_QUESTIONS if unseen else _QUESTIONS[:-1]).format(
        caption=captions[0], columns=", ".join(chosen)
    )
    style = rng.choice(_STYLES)

    openings = [f"<table>\n<caption>{caption}</caption>\n" + _row(style, columns) for caption in captions]
    budget = Budget(target_tokens - 1 - count_tokens(question), count_tokens)
    for frame in (_HEAD, _FOOT, *openings, *["</table>\n"] * len(captions)):
        if not budget.take(frame):
            raise ValueError(f"target_tokens is {target_tokens}: an empty page alone does not fit")

    # At most 32 rows each, so that answers stay near 1,000 tokens; longer pages grow by paragraphs.
    rows: list[list[dict[str, str]]] = [[] for _ in captions]
    paragraphs: list[str] = []
    row_share = rng.uniform(0.5, 1.0)
    while True:
        table = rng.choice(rows)
        if len(table) < 32 and rng.random() < row_share:
            row = {column: _COLUMNS[column](rng, split) for column in columns}
            if not budget.take(_row(style, list(row.values()))):
                break
            table.append(row)
        else:
            paragraph = f"<p>{filler(rng, split)}</p>\n"
            if not budget.take(paragraph):
                break
            paragraphs.append(paragraph)
    paragraphs += budget.fill(rng, split, lambda: "\n")

    tables = [
        opening + "".join(_row(style, list(row.values())) for row in table) + "</table>\n"
        for opening, table in zip(openings, rows, strict=True)
    ]
    rng.shuffle(tables)
    cuts = sorted(rng.randint(0, len(paragraphs)) for _ in tables)
    body = _HEAD
    start = 0
    for cut, text in zip(cuts, tables, strict=True):
        body += "".join(paragraphs[start:cut]) + text
        start = cut
    body += "".join(paragraphs[start:]) + _FOOT
    lines = [chosen, *([row[column] for column in chosen] for row in rows[0])]
    answer = "\n".join("\t".join(line) for line in lines)
    return Sample("table", body, (Question(question, answer),))


def _row(style: tuple[str, str, str, str], cells: list[str]) -> str:
    row_open, cell_open, cell_close, row_close = style
    return row_open + "".join(cell_open + cell + cell_close for cell in cells) + row_close


def _captions(rng: random.Random, split: Split, count: int) -> list[str]:
    captions: list[str] = []
    while len(captions) < count:
        caption = f"{coined_word(rng, split)} {rng.choice(('ledger', 'register', 'list', 'index'))}"
        if caption not in captions:
            captions.append(caption)
    return captions
