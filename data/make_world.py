"""The Lantern Isles: a little world with facts, small enough to learn in two minutes of training.

Every islander has a trade, a home and a pet, and a whim that matters to nobody. A note on the ferry's notice board tells two
things about somebody ("Odo works the loom and feeds a billy."); a query introduces a newcomer with all three ("Mira makes
blankets, fishes off Tern Rock and walks a spaniel."). Three tasks ask for the newcomer's kin: by trade, by home, by pet. So each
idea of the report can matter here:

- instructions: the same query has other positives under each of the three;
- soft labels: a note about the same trade is grade 2, one about another trade of the same guild (home of the same isle, pet of
  the same family) is grade 1. No two ways of saying a thing share a word that would tell, so a grade has to be learnt;
- mining: some negatives are as relevant as the positive. The teacher gives them at least 0.95 of the positive's score, as the
  95 % rule expects, and `relevance` knows the truth.

The facts and their wordings are shared by training and held-out texts, the combinations of facts are not (`held_out`).

    python data/make_world.py               writes data/soft_labels.jsonl and data/held_out/ (both are in the repository)
    python data/make_world.py --raw DIR     writes pairs.jsonl, corpus.jsonl, truth.jsonl for run_label.py: `raw_pairs`

Standard library only; the same bytes on any machine. No evidence for the method: labels are right by construction.
"""

import argparse
import json
import random
from pathlib import Path

SEED = 7
ROWS_PER_TASK = 480
TRAIN_NOTES, HELD_OUT_NOTES, HELD_OUT_QUERIES = 1600, 320, 80
NEGATIVES = 7
RELATED = 2  # negatives of grade 1 in a row
TEMPTING = 2  # negatives of grade 0 that would be positives under another instruction
PLANTED = 0.3  # chance that a row has a false negative
TEACHER = {2: 0.90, 1: 0.66, 0: 0.26}  # score by grade ...
NOISE = 0.02  # ... give or take; small enough that 0.88 / 0.92 > 0.95

INSTRUCTIONS = {
    "trade": "Find islanders who do similar work.",
    "home": "Find islanders who live close by.",
    "pet": "Find islanders who keep a similar pet.",
}
TASK_NAMES = {"trade": "LanternTrade", "home": "LanternHome", "pet": "LanternPet"}

# A line is a value: its group (guild, isle, family), then the ways to say it.
TRADES = """
grain: bakes bread, kneads dough at dawn, sells warm loaves
grain: grinds flour, minds the windmill, sifts the meal
grain: brews ale, tends the malt vats, fills the barrels
sea: catches cod, casts nets at night, brings in herring
sea: rows the ferry, carries folk across, works the oars
sea: dives for pearls, gathers oysters, hunts sponges
cloth: weaves wool, works the loom, makes blankets
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
soil: tends the hives, sells honey, melts beeswax
cure: dries herbs, mixes syrups, sells ointment
cure: delivers babies, rocks newborns, helps at births
cure: pulls teeth, drills molars, fits false gums
ink: copies letters, sharpens quills, writes for others
ink: sets type, prints handbills, inks the press
ink: binds books, stitches spines, gilds covers
light: trims the great lamp, keeps the lighthouse, climbs to the beacon
light: dips candles, pours tallow, twists wicks
light: blows glass, makes bottles, shapes lenses
music: plays the fiddle, rosins a bow, leads the reels
music: beats the drum, keeps time, marches in front
music: sings ballads, hits high notes, trains the choir
stone: cuts granite, builds walls, mixes mortar
stone: throws pots, glazes jugs, fires the kiln
stone: lays slates, fixes roofs, sweeps chimneys
town: brings the post, sorts parcels, stamps envelopes
town: settles quarrels, wears the wig, hears the court
town: counts taxes, collects the toll, guards the purse
"""

HOMES = """
salt: lives in Saltmere, rents by the brine well, sleeps near the white pans
salt: lives in Drywick, rents by the old dyke, sleeps near the reed beds
salt: lives in Cracklehythe, rents by the sluice, sleeps near the mudflats
gull: lives in Tern Rock, rents by the broken pier, sleeps near the cliff stair
gull: lives in Featherby, rents by the nesting ledge, sleeps near the windsock
gull: lives in Shriek Point, rents by the foghorn, sleeps near the wreck
moss: lives in Greenhollow, rents by the mill pond, sleeps near the ferns
moss: lives in Dripstead, rents by the waterfall, sleeps near the wet cave
moss: lives in Toadbridge, rents by the ford, sleeps near the stepping stones
ember: lives in Ashford, rents by the hot spring, sleeps near the crater
ember: lives in Cinderton, rents by the lava wall, sleeps near the black beach
ember: lives in Smoulder Gap, rents by the vents, sleeps near the sulphur pool
crown: lives in Kingsgate, rents by the palace, sleeps near the parade ground
crown: lives in Heraldry Lane, rents by the town gate, sleeps near the statue
crown: lives in Sceptre Hill, rents by the throne oak, sleeps near the banners
bramble: lives in Thornbury, rents by the hedge maze, sleeps near the berry patch
bramble: lives in Hazelcot, rents by the nut grove, sleeps near the charcoal pits
bramble: lives in Briarley, rents by the rose arch, sleeps near the fox earth
bell: lives in Chimewell, rents by the abbey, sleeps near the cloister
bell: lives in Tollington, rents by the steeple, sleeps near the graveyard
bell: lives in Vesper Row, rents by the chapel, sleeps near the crypt
frost: lives in Icewick, rents by the glacier, sleeps near the sled run
frost: lives in Snowdrop, rents by the pass, sleeps near the ski hut
frost: lives in Rimeford, rents by the frozen lake, sleeps near the ice house
market: lives in Barter Cross, rents by the weigh house, sleeps near the stalls
market: lives in Pennygate, rents by the mint, sleeps near the bank
market: lives in Cheap Street, rents by the arcade, sleeps near the pawnshop
vine: lives in Grapeholm, rents by the wine cellar, sleeps near the terraces
vine: lives in Sunnyside, rents by the olive press, sleeps near the fig wall
vine: lives in Cork End, rents by the tavern, sleeps near the bottle kiln
dune: lives in Sandown, rents by the bathing huts, sleeps near the spit
dune: lives in Marram, rents by the long beach, sleeps near the driftwood
dune: lives in Shellness, rents by the lagoon, sleeps near the boardwalk
star: lives in Skywatch, rents by the dome, sleeps near the telescope
star: lives in Comet Hill, rents by the sundial, sleeps near the radio mast
star: lives in Moonrise, rents by the tide clock, sleeps near the planetarium
"""

PETS = """
hoof: keeps a goat, feeds a billy, milks a nanny
hoof: keeps a sheep, feeds a ram, shears a ewe
hoof: keeps a donkey, feeds a mule, saddles a jenny
hound: keeps a spaniel, walks a gundog, whistles to a retriever
hound: keeps a terrier, walks a ratter, digs with a dachshund
hound: keeps a greyhound, walks a whippet, races a lurcher
cat: keeps a tabby, strokes a striped tom, owns a mackerel puss
cat: keeps a ginger cat, strokes a marmalade, owns an orange mouser
cat: keeps a siamese, strokes a blue eyed queen, owns a seal point
seabird: keeps a puffin, tickles a sea parrot, owns a bright beak
seabird: keeps a seagull, tickles a chip thief, owns a squawker
seabird: keeps a pelican, tickles a pouch bill, owns a big gulper
songbird: keeps a canary, cages a yellow singer, wakes to a warbler
songbird: keeps a robin, cages a redbreast, wakes to a ruddock
songbird: keeps a nightingale, cages a night singer, wakes to a philomel
hunter: keeps an owl, flies a hooter, gloves a barn ghost
hunter: keeps a falcon, flies a peregrine, gloves a stooper
hunter: keeps a kestrel, flies a windhover, gloves a hoverer
fowl: keeps a duck, herds a mallard, follows a waddler
fowl: keeps a goose, herds a gander, follows a honker
fowl: keeps a swan, herds a cob, follows a long neck
rodent: keeps a mouse, pockets a nibbler, cuddles a cheese lover
rodent: keeps a squirrel, pockets a nutcracker, cuddles a bushtail
rodent: keeps a hamster, pockets a wheel runner, cuddles a cheek stuffer
scale: keeps a tortoise, warms a shellback, polishes a slow walker
scale: keeps a lizard, warms a gecko, polishes a wall climber
scale: keeps a snake, warms an adder, polishes a hisser
pond: keeps a frog, nets a croaker, ponds a leaper
pond: keeps a newt, nets an eft, ponds a salamander
pond: keeps a toad, nets a warty one, ponds a natterjack
fin: keeps a goldfish, bowls a golden finner, watches a bowl circler
fin: keeps a carp, bowls a koi, watches a bottom feeder
fin: keeps an eel, bowls an elver, watches a wriggler
shell: keeps a crab, boxes a pincher, trains a sidestepper
shell: keeps a snail, boxes a slimy, trains a house carrier
shell: keeps a lobster, boxes a big claw, trains a crayfish
"""

WHIMS = """
whim: hums at the window
whim: never wears shoes
whim: tells long stories
whim: loves thunder
whim: collects buttons
whim: laughs too loud
whim: owes me a penny
whim: dances on Fridays
whim: dreads the dentist
whim: eats onions raw
whim: wins at cards
whim: snores terribly
"""

NAMES = (
    "Ada Bram Cora Dov Edda Finn Gwen Hal Ines Jory Kit Lena Mira Ned Odo Pia Quill Rhea Sten Tove Una Vita Wim Xan Yara Zeb"
).split()
NOTE_FRAMES = ["{who} {0} and {1}.", "{who}, who {0}, {1}.", "{0}, {1}: {who}.", "Meet {who}: {0}, {1}."]
QUERY_FRAMES = ["{who} {0}, {1} and {2}.", "{who} {0} and {1}, {2}.", "New here: {who} {0}, {1}, {2}."]


def read_values(table):
    """-> list of (group, ways to say it), one for each line."""
    lines = [line.split(": ") for line in table.strip().splitlines()]
    return [(group, ways.split(", ")) for group, ways in lines]


VALUES = {key: read_values(table) for key, table in dict(trade=TRADES, home=HOMES, pet=PETS, whim=WHIMS).items()}


def held_out(facts):
    """A quarter of all combinations of facts is never seen in training."""
    return sum(facts.values()) % 4 == 0


def draw_facts(rng, keys, *, for_training):
    """A value number for each of the keys, from the training's or the held-out combinations."""
    while True:
        facts = {key: rng.randrange(len(VALUES[key])) for key in keys}
        if held_out(facts) != for_training:
            return facts


def tell(rng, facts, frames):
    """One sentence with all the facts, in any order."""
    told = [rng.choice(VALUES[key][value][1]) for key, value in facts.items()]
    rng.shuffle(told)
    sentence = rng.choice(frames).format(*told, who=rng.choice(NAMES))
    return sentence[0].upper() + sentence[1:]


def make_notes(rng, count, *, for_training):
    """-> [(text, facts)], no text twice. Two facts each; on average every second note is about a given task."""
    notes = {}
    while len(notes) < count:
        facts = draw_facts(rng, rng.sample(list(VALUES), 2), for_training=for_training)
        notes.setdefault(tell(rng, facts, NOTE_FRAMES), facts)
    return list(notes.items())


def make_queries(rng, count, *, for_training):
    """-> [(text, facts)], no text twice; all three facts that a task may ask for."""
    queries = {}
    while len(queries) < count:
        facts = draw_facts(rng, INSTRUCTIONS, for_training=for_training)
        queries.setdefault(tell(rng, facts, QUERY_FRAMES), facts)
    return list(queries.items())


def relevance(task, query_facts, note_facts):
    """The truth: 2 = the same value, 1 = another value of its group, 0 = anything else, or not told."""
    if task not in note_facts or task not in query_facts:
        return 0
    asked, told = query_facts[task], note_facts[task]
    return 2 if asked == told else int(VALUES[task][asked][0] == VALUES[task][told][0])


def make_row(rng, task, query, notes):
    """One line of soft_labels.jsonl: 1 positive, 7 negatives (perhaps with a planted false one), the teacher's scores."""
    text, facts = query
    by_grade = {0: [], 1: [], 2: []}
    for note in notes:
        by_grade[relevance(task, facts, note[1])].append(note)
    other_tasks = [other for other in INSTRUCTIONS if other != task]
    tempting = [note for note in by_grade[0] if any(relevance(other, facts, note[1]) == 2 for other in other_tasks)]

    positive, false_negative = rng.sample(by_grade[2], 2)
    negatives = [false_negative] if rng.random() < PLANTED else []
    negatives += rng.sample(by_grade[1], RELATED) + rng.sample(tempting, min(TEMPTING, len(tempting)))
    plain = [note for note in by_grade[0] if note not in negatives]
    negatives += rng.sample(plain, NEGATIVES - len(negatives))

    def score(note):
        return round(TEACHER[relevance(task, facts, note[1])] + rng.uniform(-NOISE, NOISE), 2)

    scored = sorted(((score(note), note[0]) for note in negatives), reverse=True)  # hardest first
    return {
        "query": text,
        "pos": [positive[0]],
        "neg": [note for _, note in scored],
        "pos_scores": [score(positive)],
        "neg_scores": [value for value, _ in scored],
        "prompt": INSTRUCTIONS[task],
        "type": "normal",
        "task": TASK_NAMES[task],
    }


def soft_label_rows():
    """-> the rows of soft_labels.jsonl: every training query under each of the three instructions."""
    rng = random.Random(SEED)
    notes = make_notes(rng, TRAIN_NOTES, for_training=True)
    queries = make_queries(rng, ROWS_PER_TASK, for_training=True)
    return [make_row(rng, task, query, notes) for query in queries for task in INSTRUCTIONS]


def held_out_set():
    """-> (corpus, queries, {task: qrels}): the same notes and queries for the three tasks."""
    rng = random.Random(SEED + 1)
    notes = make_notes(rng, HELD_OUT_NOTES, for_training=False)
    queries = make_queries(rng, HELD_OUT_QUERIES, for_training=False)
    corpus = [{"_id": f"note{d}", "title": "", "text": text} for d, (text, _) in enumerate(notes)]
    asked = [{"_id": f"query{q}", "text": text} for q, (text, _) in enumerate(queries)]
    qrels = {
        task: [
            {"query-id": f"query{q}", "corpus-id": f"note{d}", "score": grade}
            for q, (_, query_facts) in enumerate(queries)
            for d, (_, note_facts) in enumerate(notes)
            if (grade := relevance(task, query_facts, note_facts))
        ]
        for task in INSTRUCTIONS
    }
    return corpus, asked, qrels


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode())


def main():
    folder = Path(__file__).parent
    write_jsonl(folder / "soft_labels.jsonl", soft_label_rows())
    corpus, queries, qrels = held_out_set()
    for task, name in TASK_NAMES.items():
        (folder / "held_out" / name).mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "held_out" / name / "corpus.jsonl", corpus)
        write_jsonl(folder / "held_out" / name / "queries.jsonl", queries)
        write_jsonl(folder / "held_out" / name / "qrels.jsonl", qrels[task])
        (folder / "held_out" / name / "task.json").write_text(json.dumps({"class": "ArguAna", "instruction": INSTRUCTIONS[task]}))


if __name__ == "__main__":
    main()
