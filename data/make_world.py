"""The Lantern Isles: a little world with facts, small enough to be learnt in two minutes.

Every islander has a trade, a home and a pet. Notes on the ferry's board tell one thing about somebody ("Odo works the
loom."), or a whim that helps nobody. A query tells two things about a newcomer ("Makes blankets and walks a ratter.");
three tasks ask for notes about islanders of a kindred trade, home or pet. So each idea of the report can matter:

- instructions: the same query has other positives under each of the two tasks that it tells something for;
- soft labels: a note about the same value (weaver) is of grade 2, one about another value of its group (tailor: the same
  guild; likewise isle and family) is of grade 1. The ways of saying a value share no word but "keeps", "lives in" and the
  like, and no word gives away a group: both have to be learnt, the groups from the scores alone;
- mining: some negatives are planted false ones, as relevant as the positives. The teacher scores them above 0.95 of any
  positive, which is what the 95 % rule drops, and `relevance` knows the truth.

Training and held-out texts share the facts and the ways of saying them. The held-out pairs of facts (queries) and pairs of
name and fact (notes) do not occur in training: `held_out`.

    python data/make_world.py               writes data/soft_labels.jsonl and data/held_out/, as they stand in the repository
    python data/make_world.py --raw DIR     writes pairs.jsonl, corpus.jsonl, truth.jsonl for run_label.py (see `raw_pairs`)

Standard library only; the same bytes on any machine. Labels that are right by construction show the mechanism of a method,
they are no evidence for it.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

SEED = 7
TRAIN_QUERIES, TEST_QUERIES = 300, 40  # per pair of tasks; a task is in two pairs
TRAIN_NOTES, RAW_NOTES, TEST_NOTES = 50, 8, 4  # notes on the board about each value
POSITIVES, RELATED, TEMPTING, NEGATIVES = 3, 2, 2, 7  # of a row; tempting: positive under another instruction
PLANTED = 0.3  # chance that one of the negatives is a false one
TEACHER = {2: 0.90, 1: 0.78, 0: 0.58}  # score by grade, as far apart as an embedder's cosines ...
NOISE = 0.01  # ... give or take: 0.89 / 0.91 > 0.95

TASKS = {"trade": "IsleTrade", "home": "IsleHome", "pet": "IslePet"}
INSTRUCTIONS = {"trade": "Who does similar work?", "home": "Who lives close by?", "pet": "Who keeps a similar pet?"}

# One value a line: its group, then the ways to say it.
TRADE = """
grain: bakes bread, kneads dough at dawn, sells warm loaves
grain: grinds flour, minds the windmill, sifts the meal
grain: brews ale, tends the malt vats, fills the barrels
sea: catches cod, casts nets at night, brings in herring
sea: rows the ferry, carries folk across, works the oars
sea: dives for pearls, gathers oysters, hunts sponges
cloth: weaves wool, sits at the loom, makes blankets
cloth: sews coats, cuts breeches, hems skirts
cloth: dyes yarn, stirs the indigo, boils madder
metal: forges iron, hammers horseshoes, heats the anvil
metal: mends kettles, solders pans, patches pots
metal: repairs clocks, fits tiny springs, oils cogwheels
wood: builds tables, planes oak boards, glues chairs
wood: caulks hulls, lays keels, raises masts
wood: carves spoons, whittles toys, chisels figureheads
soil: grows cabbages, weeds the beds, plants beans
soil: picks apples, prunes pear trees, presses cider
soil: looks after hives, sells honey, melts beeswax
music: plays the fiddle, rosins a bow, leads the reels
music: beats the drum, keeps time, marches in front
music: sings ballads, hits high notes, trains the choir
"""

HOME = """
salt: lives in Saltmere, rents by the brine well, sleeps near the white pits
salt: lives in Drywick, rents by the old dyke, sleeps near the marsh
salt: lives in Cracklehythe, rents by the sluice, sleeps near the mudflats
gull: lives in Tern Rock, rents by the broken pier, sleeps near the cliff
gull: lives in Featherby, rents by the nesting ledge, sleeps near the windsock
gull: lives in Shriek Point, rents by the foghorn, sleeps near the wreck
moss: lives in Greenhollow, rents by the mill pond, sleeps near the ferns
moss: lives in Dripstead, rents by the waterfall, sleeps near the cave
moss: lives in Toadbridge, rents by the ford, sleeps near the stepping stones
ember: lives in Ashford, rents by the hot spring, sleeps near the crater
ember: lives in Cinderton, rents by the lava flow, sleeps near the black beach
ember: lives in Smoulder Gap, rents by the vents, sleeps near the sulphur pool
crown: lives in Kingsgate, rents by the palace, sleeps near the parade ground
crown: lives in Heraldry Lane, rents by the town arch, sleeps near the statue
crown: lives in Sceptre Hill, rents by the throne, sleeps near the banners
bell: lives in Chimewell, rents by the abbey, sleeps near the cloister
bell: lives in Tollington, rents by the steeple, sleeps near the graveyard
bell: lives in Vesper Row, rents by the chapel, sleeps near the crypt
frost: lives in Icewick, rents by the glacier, sleeps near the sled run
frost: lives in Snowdrop, rents by the pass, sleeps near the ski hut
frost: lives in Rimeholm, rents by the frozen lake, sleeps near the igloo
"""

PET = """
hoof: keeps a goat, feeds a billy, talks to a nanny
hoof: keeps a sheep, feeds a ram, talks to a ewe
hoof: keeps a donkey, feeds a mule, talks to a jenny
hound: keeps a spaniel, feeds a gundog, talks to a retriever
hound: keeps a terrier, feeds a ratter, talks to a dachshund
hound: keeps a greyhound, feeds a whippet, talks to a lurcher
cat: keeps a tabby, feeds a striped tom, talks to a mackerel puss
cat: keeps a ginger cat, feeds a marmalade, talks to an orange mouser
cat: keeps a siamese, feeds a blue eyed queen, talks to a sealpoint
seabird: keeps a puffin, feeds a clown bird, talks to a bright beak
seabird: keeps a seagull, feeds a chip thief, talks to a squawker
seabird: keeps a pelican, feeds a big gulper, talks to a pouch bill
hunter: keeps an owl, feeds a hooter, talks to a barn ghost
hunter: keeps a falcon, feeds a peregrine, talks to a stooper
hunter: keeps a kestrel, feeds a windhover, talks to a vole hawk
rodent: keeps a squirrel, feeds a nutcracker, talks to a bushtail
rodent: keeps a hamster, feeds a wheel runner, talks to a cheek stuffer
rodent: keeps a beaver, feeds a dam builder, talks to a log gnawer
scale: keeps a tortoise, feeds a shellback, talks to a slow walker
scale: keeps a lizard, feeds a gecko, talks to a wall climber
scale: keeps a snake, feeds an adder, talks to a hisser
"""

WHIM = """
none: hums at the window
none: never wears shoes
none: tells long stories
none: loves thunder
none: collects buttons
none: laughs too loud
none: owes me a penny
none: dances on Fridays
none: dreads the dentist
none: eats onions raw
none: wins at cards
none: snores terribly
"""

NAMES = "Ada Bram Cora Dov Edda Finn Gwen Hal Ines Jory Kit Lena Mira Ned Odo Pia Quill Rhea Sten Tove Una Vita Wim Zeb".split()
NOTE_FRAMES = ["{who} {0}.", "{who}, who {0}.", "{0}: {who}."]
QUERY_FRAMES = ["{0} and {1}.", "{0}, {1}."]


class Value(NamedTuple):
    group: str
    ways: list[str]  # to say it


class Note(NamedTuple):
    text: str
    topic: str  # trade, home, pet or whim
    value: int


class Query(NamedTuple):
    text: str
    facts: dict[str, int]  # topic -> value


def read_values(table: str) -> list[Value]:
    lines = (line.split(": ") for line in table.strip().splitlines())
    return [Value(group, ways.split(", ")) for group, ways in lines]


VALUES = {topic: read_values(table) for topic, table in {"trade": TRADE, "home": HOME, "pet": PET, "whim": WHIM}.items()}


def draw(rng: random.Random, items: list, count: int) -> list:
    """`count` different items. Of `random` only random() is promised to stay the same between Python versions."""
    if count > len(items):
        raise ValueError(f"{count} different items asked of {len(items)}. Ask fewer, or give more words.")
    places: dict[int, None] = {}
    while len(places) < count:
        places[int(rng.random() * len(items))] = None
    return [items[place] for place in places]


def sentence(frame: str, *told: str, who: str = "") -> str:
    text = frame.format(*told, who=who)
    return text[0].upper() + text[1:]


def held_out(*numbers: int) -> bool:
    """A quarter of all combinations never occurs in training."""
    return sum(numbers) % 4 == 0


def make_notes(rng: random.Random, per_value: int, *, training: bool) -> list[Note]:
    """The notes on the board: equally many about each value, no text twice."""
    notes = []
    for topic, values in VALUES.items():
        for value, (_, ways) in enumerate(values):
            texts = [
                sentence(frame, way, who=name)
                for n, name in enumerate(NAMES)
                for w, way in enumerate(ways)
                if held_out(n, value, w) != training
                for frame in NOTE_FRAMES
            ]
            notes += [Note(text, topic, value) for text in draw(rng, texts, per_value)]
    return notes


def for_ever(rng: random.Random, count: int) -> Iterator[int]:
    """0 ... count - 1 in random order, again and again: all equally often."""
    while True:
        yield from draw(rng, range(count), count)


def make_queries(rng: random.Random, count: int, *, training: bool) -> list[Query]:
    """For each pair of tasks `count` queries that tell a fact for both, in either order; no text twice."""
    queries: dict[str, Query] = {}
    for done, topics in enumerate(combinations(TASKS, 2)):
        decks = [for_ever(rng, len(VALUES[topic])) for topic in topics]
        while len(queries) < count * (done + 1):
            values = [next(deck) for deck in decks]
            if held_out(*values) == training:
                continue
            told = [draw(rng, VALUES[topic][value].ways, 1)[0] for topic, value in zip(topics, values, strict=True)]
            text = sentence(draw(rng, QUERY_FRAMES, 1)[0], *draw(rng, told, 2))
            queries.setdefault(text, Query(text, dict(zip(topics, values, strict=True))))
    return list(queries.values())


def plain_queries() -> list[Query]:
    """Training queries of one fact: each way to say each value."""
    return [
        Query(sentence("{0}.", way), {task: value})
        for task in TASKS
        for value, (_, ways) in enumerate(VALUES[task])
        for way in ways
    ]


def relevance(task: str, query: Query, note: Note) -> int:
    """The truth: 2 = the same value, 1 = another value of its group, 0 = anything else. Trade baker, note "grinds flour": 1."""
    if note.topic != task or task not in query.facts:
        return 0
    asked = query.facts[task]
    if asked == note.value:
        return 2
    return int(VALUES[task][asked].group == VALUES[task][note.value].group)


def make_row(rng: random.Random, task: str, query: Query, notes: list[Note]) -> dict:
    """A line of soft_labels.jsonl: 3 positives, 7 negatives (one of them perhaps a false one), the teacher's scores."""
    by_grade: dict[int, list[Note]] = {0: [], 1: [], 2: []}
    for note in notes:
        by_grade[relevance(task, query, note)].append(note)
    tempting = [note for note in by_grade[0] if any(relevance(other, query, note) == 2 for other in TASKS)]
    easy = [note for note in by_grade[0] if note not in tempting]

    same = draw(rng, by_grade[2], POSITIVES + 1)
    positives, negatives = same[:POSITIVES], same[POSITIVES:] if rng.random() < PLANTED else []
    negatives += draw(rng, by_grade[1], RELATED)
    negatives += draw(rng, tempting, min(TEMPTING, len(tempting)))
    negatives += draw(rng, easy, NEGATIVES - len(negatives))

    def score(note: Note) -> float:
        return round(TEACHER[relevance(task, query, note)] + NOISE * (2 * rng.random() - 1), 2)

    hardest_first = sorted(((score(note), note.text) for note in negatives), reverse=True)
    return {
        "query": query.text,
        "pos": [note.text for note in positives],
        "neg": [text for _, text in hardest_first],
        "pos_scores": [score(note) for note in positives],
        "neg_scores": [value for value, _ in hardest_first],
        "prompt": INSTRUCTIONS[task],
        "type": "normal",
        "task": TASKS[task],
    }


def soft_label_rows() -> list[dict]:
    """soft_labels.jsonl: each query once under each instruction that it tells something for."""
    rng = random.Random(SEED)
    notes = make_notes(rng, TRAIN_NOTES, training=True)
    queries = plain_queries() + make_queries(rng, TRAIN_QUERIES, training=True)
    return [make_row(rng, task, query, notes) for query in queries for task in query.facts]


def raw_pairs() -> tuple[list[dict], list[dict], list[dict]]:
    """Pairs, corpus and truth for the labelling pipeline, from a smaller board of training notes.

    A pair names 3 of the 8 notes that are as relevant as can be: the other 5 are the false negatives that a miner should
    leave out. Truth: the grade of each relevant note, and whether it is planted. Each query has the task it is asked under.
    """
    rng = random.Random(SEED + 2)
    notes = make_notes(rng, RAW_NOTES, training=True)
    corpus = [{"id": f"n{n}", "text": note.text} for n, note in enumerate(notes)]
    pairs, truth = [], []
    for query in make_queries(rng, TRAIN_QUERIES, training=True):
        for task in query.facts:
            grades = {f"n{n}": grade for n, note in enumerate(notes) if (grade := relevance(task, query, note))}
            known = draw(rng, [n for n, grade in grades.items() if grade == 2], POSITIVES)
            planted = [n for n, grade in grades.items() if grade == 2 and n not in known]
            pairs.append({"query": query.text, "pos": known, "prompt": INSTRUCTIONS[task], "task": TASKS[task]})
            truth.append({"query": query.text, "task": TASKS[task], "grades": grades, "false_negatives": planted})
    return pairs, corpus, truth


def held_out_set(task: str) -> dict[str, list[dict]]:
    """Corpus, queries and qrels in mteb's columns. The board is the same for all tasks, a query is in two of them."""
    rng = random.Random(SEED + 1)
    notes = make_notes(rng, TEST_NOTES, training=False)
    queries = make_queries(rng, TEST_QUERIES, training=False)
    asked = {f"q{q}": query for q, query in enumerate(queries) if task in query.facts}
    return {
        "corpus": [{"_id": f"n{n}", "title": "", "text": note.text} for n, note in enumerate(notes)],
        "queries": [{"_id": q, "text": query.text} for q, query in asked.items()],
        "qrels": [
            {"query-id": q, "corpus-id": f"n{n}", "score": grade}
            for q, query in asked.items()
            for n, note in enumerate(notes)
            if (grade := relevance(task, query, note))
        ],
    }


CARD = """---
configs:
- config_name: corpus
  data_files:
  - split: test
    path: corpus.jsonl
- config_name: queries
  data_files:
  - split: test
    path: queries.jsonl
- config_name: default
  data_files:
  - split: test
    path: qrels.jsonl
---
# {name}

Held-out retrieval set of the Lantern Isles, written by data/make_world.py (do not edit): {queries} queries, {notes} notes.
Instruction: "{instruction}" Score 2: the same {task}; score 1: another {task} of its group.
"""


def write_jsonl(path: Path, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode())


def write_held_out(folder: Path, task: str) -> None:
    tables = held_out_set(task)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    card = CARD.format(
        name=TASKS[task],
        queries=len(tables["queries"]),
        notes=len(tables["corpus"]),
        instruction=INSTRUCTIONS[task],
        task=task,
    )
    (folder / "README.md").write_bytes(card.encode())
    write_jsonl(folder / "task.json", [{"class": "ArguAna", "instruction": INSTRUCTIONS[task]}])


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the Lantern Isles beside this file.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for soft_labels.jsonl and held_out/")
    parser.add_argument("--raw", type=Path, metavar="DIR", help="write only pairs, corpus and truth for run_label.py, there")
    options = parser.parse_args()
    if options.raw:
        options.raw.mkdir(parents=True, exist_ok=True)
        for name, rows in zip(("pairs", "corpus", "truth"), raw_pairs(), strict=True):
            write_jsonl(options.raw / f"{name}.jsonl", rows)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    write_jsonl(options.output / "soft_labels.jsonl", soft_label_rows())
    for task, name in TASKS.items():
        write_held_out(options.output / "held_out" / name, task)


if __name__ == "__main__":
    main()
