"""What is said of a group's rows, beside the runs that say it."""

from gradjax.data.examples import to_example
from gradjax.data.sources import Source
from gradjax.data.usable import Tally

ROWS = [{"instruction": "question", "output": f"answer {n}"} for n in range(3)]


def described(rows):
    tally = Tally(Source("group", "demo"))
    for number, row in enumerate(rows):
        tally.read(to_example(row, "group", number))
    return tally.describe()


def test_the_hash_depends_on_rows_and_order():
    same = {key: ROWS[0][key] for key in reversed(ROWS[0])}
    assert described(ROWS) == described([same, *ROWS[1:]])
    assert described(ROWS)["rows"] == 3
    assert described(ROWS)["hash"] != described(ROWS[::-1])["hash"]
    assert described(ROWS)["hash"] != described(ROWS[:-1])["hash"]
