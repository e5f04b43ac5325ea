"""The Lantern Isles: a synthetic data set with known labels, small enough to be learnt in two minutes on a CPU.

Every islander has a trade, a home and a pet. A note states one fact about somebody ("Odo works the loom."), or a whim
that is relevant to no query. A query states two facts about a newcomer ("Makes blankets and walks a ratter."), and
three tasks ask for notes about islanders with a similar trade, home or pet. What there is to learn:

- instructions: a query has different positives under each of the two tasks that its facts belong to;
- soft labels: a note about the same value (weaver) has grade 2, one about another value of the same group (tailor: the
  same guild; likewise isles and families) grade 1. The phrases for a value share no word except "keeps", "lives in" and
  the like, and no word reveals the group: both must be learnt, the groups from the scores alone;
- mining: some negatives are planted false negatives, as relevant as the positives. The teacher scores them above 0.95
  of every positive, so the 95 % rule rejects them, and `relevance` knows the truth.

Training and held-out texts share facts and phrases. Held-out pairs of facts (queries) and of name and fact (notes) do
not occur in training: see `is_held_out`.

    python data/make_world.py               write data/soft_labels.jsonl and data/held_out/, as in the repository
    python data/make_world.py --raw DIR     write pairs.jsonl, corpus.jsonl, truth.jsonl for run_label.py

Standard library only; the same bytes on every machine. Labels that are correct by construction show the mechanism of a
method; they are no evidence for it.
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
TRAIN_NOTES, RAW_NOTES, TEST_NOTES = 50, 8, 4  # notes about each value
POSITIVES, NEGATIVES = 3, 7  # of a line
RELATED, OTHER_TASK = 2, 2  # of the negatives: grade 1, and positive under another instruction
PLANTED = 0.3  # probability that one of the negatives is a false negative
TEACHER = {2: 0.90, 1: 0.78, 0: 0.58}  # score by grade, as far apart as an embedder's cosines
NOISE = 0.01  # added or subtracted at most; 0.89 / 0.91 > 0.95

TASKS = {"trade": "IsleTrade", "home": "IsleHome", "pet": "IslePet"}
INSTRUCTIONS = {"trade": "Who does similar work?", "home": "Who lives close by?", "pet": "Who keeps a similar pet?"}

# One value per line: its group, then its phrases.
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

WHIMS = ("hums at the window, never wears shoes, tells long stories, loves thunder, collects buttons, laughs too loud, "
         "owes me a penny, dances on Fridays, dreads the dentist, eats onions raw, wins at cards, snores terribly")
NAMES = "Ada Bram Cora Dov Edda Finn Gwen Hal Ines Jory Kit Lena Mira Ned Odo Pia Quill Rhea Sten Tove Una Vita Wim Zeb"
NOTE_FRAMES = ["{who} {0}.", "{who}, who {0}.", "{0}: {who}."]
QUERY_FRAMES = ["{0} and {1}.", "{0}, {1}."]


class Value(NamedTuple):
    """One value of a topic."""

    group: str
    phrases: list[str]


class Note(NamedTuple):
    """A passage."""

    text: str
    topic: str  # trade, home, pet or whim
    value: int


class Query(NamedTuple):
    """A query."""

    text: str
    facts: dict[str, int]  # topic -> value


def read_values(table: str) -> list[Value]:
    """Parse one of the tables above."""
    lines = (line.split(": ") for line in table.strip().splitlines())
    return [Value(group, phrases.split(", ")) for group, phrases in lines]


VALUES = {topic: read_values(table) for topic, table in {"trade": TRADE, "home": HOME, "pet": PET}.items()}
VALUES["whim"] = [Value("none", [whim]) for whim in WHIMS.split(", ")]


def sample(rng: random.Random, items: list, count: int) -> list:
    """`count` different items. Only random() is guaranteed to be equal in all Python versions."""
    if count > len(items):
        raise ValueError(f"count must be at most {len(items)}, the number of items (got {count})")
    places: dict[int, None] = {}
    while len(places) < count:
        places[int(rng.random() * len(items))] = None
    return [items[place] for place in places]


def sentence(frame: str, *phrases: str, who: str = "") -> str:
    """Fill a frame; the first letter becomes a capital."""
    text = frame.format(*phrases, who=who)
    return text[0].upper() + text[1:]


def is_held_out(*numbers: int) -> bool:
    """Whether a combination is held out: a quarter of all, which never occur in training."""
    return sum(numbers) % 4 == 0


def make_notes(rng: random.Random, per_value: int, *, training: bool) -> list[Note]:
    """Equally many notes about each value, without duplicates."""
    notes = []
    for topic, values in VALUES.items():
        for value, (_, phrases) in enumerate(values):
            texts = [sentence(frame, phrase, who=name)
                     for n, name in enumerate(NAMES.split()) for p, phrase in enumerate(phrases)
                     if is_held_out(n, value, p) != training for frame in NOTE_FRAMES]
            notes += [Note(text, topic, value) for text in sample(rng, texts, per_value)]
    return notes


def shuffled_forever(rng: random.Random, count: int) -> Iterator[int]:
    """0 ... count - 1 in random order, again and again: all equally often."""
    while True:
        yield from sample(rng, range(count), count)


def make_queries(rng: random.Random, count: int, *, training: bool) -> list[Query]:
    """`count` queries for each pair of tasks, with a fact for both in either order, without duplicates."""
    queries: dict[str, Query] = {}
    for done, topics in enumerate(combinations(TASKS, 2)):
        decks = [shuffled_forever(rng, len(VALUES[topic])) for topic in topics]
        while len(queries) < count * (done + 1):
            values = [next(deck) for deck in decks]
            if is_held_out(*values) == training:
                continue
            phrases = [sample(rng, VALUES[topic][value].phrases, 1)[0]
                       for topic, value in zip(topics, values, strict=True)]
            text = sentence(sample(rng, QUERY_FRAMES, 1)[0], *sample(rng, phrases, 2))
            queries.setdefault(text, Query(text, dict(zip(topics, values, strict=True))))
    return list(queries.values())


def plain_queries() -> list[Query]:
    """Training queries with one fact: each phrase of each value."""
    return [Query(sentence("{0}.", phrase), {task: value})
            for task in TASKS for value, (_, phrases) in enumerate(VALUES[task]) for phrase in phrases]


def relevance(task: str, query: Query, note: Note) -> int:
    """The true grade: 2 for the same value, 1 for another value of its group (a baker, "grinds flour"), else 0."""
    if note.topic != task or task not in query.facts:
        return 0
    value = query.facts[task]
    if value == note.value:
        return 2
    return int(VALUES[task][value].group == VALUES[task][note.value].group)


def make_line(rng: random.Random, task: str, query: Query, notes: list[Note]) -> dict:
    """A line of soft_labels.jsonl: positives, negatives (perhaps a false one among them) and the teacher's scores."""
    by_grade: dict[int, list[Note]] = {0: [], 1: [], 2: []}
    for note in notes:
        by_grade[relevance(task, query, note)].append(note)
    other_task = [note for note in by_grade[0] if relevance(note.topic, query, note) == 2]
    easy = [note for note in by_grade[0] if relevance(note.topic, query, note) != 2]

    relevant = sample(rng, by_grade[2], POSITIVES + 1)
    positives, negatives = relevant[:POSITIVES], relevant[POSITIVES:] if rng.random() < PLANTED else []
    negatives += sample(rng, by_grade[1], RELATED)
    negatives += sample(rng, other_task, min(OTHER_TASK, len(other_task)))
    negatives += sample(rng, easy, NEGATIVES - len(negatives))

    def score(note: Note) -> float:
        return round(TEACHER[relevance(task, query, note)] + NOISE * (2 * rng.random() - 1), 2)

    hardest_first = sorted(((score(note), note.text) for note in negatives), reverse=True)
    return {
        "query": query.text, "pos": [note.text for note in positives], "neg": [text for _, text in hardest_first],
        "pos_scores": [score(note) for note in positives], "neg_scores": [value for value, _ in hardest_first],
        "prompt": INSTRUCTIONS[task], "type": "normal", "task": TASKS[task]}


def soft_label_lines() -> list[dict]:
    """soft_labels.jsonl: each query under every instruction that one of its facts belongs to."""
    rng = random.Random(SEED)
    notes = make_notes(rng, TRAIN_NOTES, training=True)
    queries = plain_queries() + make_queries(rng, TRAIN_QUERIES, training=True)
    return [make_line(rng, task, query, notes) for query in queries for task in query.facts]


def raw_pairs() -> tuple[list[dict], list[dict], list[dict]]:
    """Pairs, corpus and truth for run_label.py, with fewer training notes.

    A pair marks 3 of its 8 notes of grade 2; a miner should reject the other 5, the planted false negatives. Truth: the
    grade of each relevant note and the planted ones, by query and task.
    """
    rng = random.Random(SEED + 2)
    notes = make_notes(rng, RAW_NOTES, training=True)
    corpus = [{"id": f"n{n}", "text": note.text} for n, note in enumerate(notes)]
    pairs, truth = [], []
    for query in make_queries(rng, TRAIN_QUERIES, training=True):
        for task in query.facts:
            grades = {f"n{n}": grade for n, note in enumerate(notes) if (grade := relevance(task, query, note))}
            known = sample(rng, [n for n, grade in grades.items() if grade == 2], POSITIVES)
            planted = [n for n, grade in grades.items() if grade == 2 and n not in known]
            pairs.append({"query": query.text, "pos": known, "prompt": INSTRUCTIONS[task], "task": TASKS[task]})
            truth.append({"query": query.text, "task": TASKS[task], "grades": grades, "false_negatives": planted})
    return pairs, corpus, truth


def held_out_set(task: str) -> dict[str, list[dict]]:
    """Corpus, queries and qrels in mteb's columns. All tasks have the same corpus; a query is in two of them."""
    rng = random.Random(SEED + 1)
    notes = make_notes(rng, TEST_NOTES, training=False)
    queries = make_queries(rng, TEST_QUERIES, training=False)
    of_task = {f"q{q}": query for q, query in enumerate(queries) if task in query.facts}
    return {
        "corpus": [{"_id": f"n{n}", "title": "", "text": note.text} for n, note in enumerate(notes)],
        "queries": [{"_id": q, "text": query.text} for q, query in of_task.items()],
        "qrels": [{"query-id": q, "corpus-id": f"n{n}", "score": grade} for q, query in of_task.items()
                  for n, note in enumerate(notes) if (grade := relevance(task, query, note))]}


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


def jsonl(rows: list[dict]) -> bytes:
    """One JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()


def write_held_out(folder: Path, task: str) -> None:
    """Write a task's held-out set with its dataset card."""
    tables = held_out_set(task)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_bytes(jsonl(rows))
    card = CARD.format(name=TASKS[task], queries=len(tables["queries"]), notes=len(tables["corpus"]),
                       instruction=INSTRUCTIONS[task], task=task)
    (folder / "README.md").write_bytes(card.encode())
    (folder / "task.json").write_bytes(jsonl([{"class": "ArguAna", "instruction": INSTRUCTIONS[task]}]))


def main() -> None:
    """Write the training and held-out files, or with --raw the files for run_label.py."""
    parser = argparse.ArgumentParser(description="Write the sample data, the Lantern Isles.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, default=Path(__file__).parent, help="(default: the folder of this file)")
    where.add_argument("--raw", type=Path, metavar="DIR", help="write only the files for run_label.py, there")
    given = parser.parse_args()
    folder = given.raw or given.output
    folder.mkdir(parents=True, exist_ok=True)
    if given.raw:
        files = {folder / f"{name}.jsonl": jsonl(rows) for name, rows in zip(
            ("pairs", "corpus", "truth"), raw_pairs(), strict=True)}
        for path, content in files.items():
            if path.exists() and path.read_bytes() != content:
                parser.error(f"--raw {folder}: {path} exists and holds something else; give another folder")
        for path, content in files.items():
            path.write_bytes(content)
        return
    (folder / "soft_labels.jsonl").write_bytes(jsonl(soft_label_lines()))
    for task, name in TASKS.items():
        write_held_out(folder / "held_out" / name, task)


if __name__ == "__main__":
    main()
