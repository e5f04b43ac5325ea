"""The paper's claims, with the expected sign of each, and the arms that test them; written before they first ran.

A claim compares two arms (claims.py); an arm is one change of the default training (experiment.py).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Arm:
    """One arm of the study: options of run_train.py, a change of the data, in-context examples at evaluation."""

    options: tuple[str, ...] = ()
    change: str = ""  # see experiment_data.py
    num_examples: int = 0
    steps: float = 1.0  # times the steps of the setting


TEACHER = "teacher"

ARMS = {
    "default": Arm(),
    "default, 2 at evaluation": Arm(num_examples=2),
    "default, 5 at evaluation": Arm(num_examples=5),
    "contrastive term only": Arm(("--soft-label-weight", "0")),
    "soft-label term only": Arm(("--contrastive-weight", "0")),
    "teacher temperature 0.016": Arm(("--teacher-temperature", "0.016")),
    "teacher temperature 0.16": Arm(("--teacher-temperature", "0.16")),
    "no instructions": Arm(change="same instruction"),
    "shuffled instructions": Arm(change="shuffled instructions"),
    "random examples": Arm(("--max-examples", "5")),
    "random examples, 2 at evaluation": Arm(("--max-examples", "5"), num_examples=2),
    "random examples, 5 at evaluation": Arm(("--max-examples", "5"), num_examples=5),
    "up to 2 examples": Arm(("--max-examples", "2")),
    "up to 2 examples, 2 at evaluation": Arm(("--max-examples", "2"), num_examples=2),
    "up to 2 examples, 5 at evaluation": Arm(("--max-examples", "2"), num_examples=5),
    "fixed examples": Arm(("--max-examples", "5"), change="fixed examples"),
    "no false-negative margin": Arm(("--false-negative-margin", "none")),
    "batch of 16": Arm(("--batch-size", "16", "--batch-size-symmetric", "16")),
    "batch of 256": Arm(("--batch-size", "256", "--batch-size-symmetric", "256", "--mini-batch-tokens", "8192")),
    "batch of 16, equal texts": Arm(("--batch-size", "16", "--batch-size-symmetric", "16"), steps=2.0),
    "batch of 256, equal texts": Arm(("--batch-size", "256", "--batch-size-symmetric", "256"), steps=1 / 8),
    "mined, percentage 0.95": Arm(change="mined percentage 0.95"),
    "mined, margin 0.05": Arm(change="mined margin 0.05"),
    "mined, absolute 0.7": Arm(change="mined absolute 0.7"),
    "mined, none": Arm(change="mined none 0"),
    "mined, random": Arm(change="mined random 0"),
    TEACHER: Arm(change=TEACHER),  # not trained: what the student is compared with
}


@dataclass(frozen=True)
class Claim:
    """`arm` compared with `baseline`."""

    text: str
    arm: str
    baseline: str
    expected: str  # the sign, with the paper's size in points if it gives one, or with the source of the expectation
    task: str = ""  # one task instead of the mean over all
    ground: str = ""  # only on this one

    @property
    def sign(self) -> int:
        """1 if `arm` is expected to be better, else -1."""
        return -1 if self.expected.startswith("-") else 1


MEDQUAD = "MedQuADRetrieval"  # the task whose texts resemble the pairs that are mined
METHOD, OURS = "+ (part of its method)", "+ (our default)"

CLAIMS = [
    Claim("soft labels added to hard labels", "default", "contrastive term only", "+0.63"),
    Claim("hard labels added to soft labels", "default", "soft-label term only", METHOD),
    Claim("teacher temperature 0.05 instead of 0.016", "default", "teacher temperature 0.016", OURS),
    Claim("teacher temperature 0.05 instead of 0.16", "default", "teacher temperature 0.16", OURS),
    Claim("with instructions instead of without", "default", "no instructions", METHOD),
    Claim("correct instead of shuffled instructions", "default", "shuffled instructions", METHOD),
    Claim("trained with 0 to 5 examples instead of none, evaluated with none", "random examples", "default", METHOD),
    Claim("trained with examples: evaluated with 2 instead of none", "random examples, 2 at evaluation",
          "random examples", "-1.02"),
    Claim("trained with examples: evaluated with 5 instead of none", "random examples, 5 at evaluation",
          "random examples", "- (as for 2)"),
    Claim("trained without examples: evaluated with 2 instead of none", "default, 2 at evaluation", "default",
          "- (never trained with them)", ground="llm"),
    Claim("trained without examples: evaluated with 5 instead of none", "default, 5 at evaluation", "default",
          "- (never trained with them)", ground="llm"),
    Claim("trained with 0 to 2 examples instead of none, evaluated with none", "up to 2 examples", "default", METHOD,
          ground="llm"),
    Claim("trained with 0 to 2 examples: evaluated with 2 instead of none", "up to 2 examples, 2 at evaluation",
          "up to 2 examples", "- (as for 0 to 5)", ground="llm"),
    Claim("trained with 0 to 2 examples: evaluated with 5 instead of none", "up to 2 examples, 5 at evaluation",
          "up to 2 examples", "- (as for 0 to 5)", ground="llm"),
    Claim("trained with fixed instead of random examples, evaluated with none", "fixed examples", "random examples",
          "-3.17 (BGE-EN-ICL)"),
    Claim("false negatives masked by a margin instead of not", "default", "no false-negative margin", OURS),
    Claim("{batch} queries per batch instead of 16, equal steps", "default", "batch of 16", "+ (it uses 512)"),
    Claim("256 queries per batch instead of {batch}, equal steps", "batch of 256", "default", "+ (it uses 512)"),
    Claim("{batch} queries per batch instead of 16, equal numbers of texts", "default", "batch of 16, equal texts",
          "+ (it uses 512)", ground="llm"),
    Claim("256 queries per batch instead of {batch}, equal numbers of texts", "batch of 256, equal texts", "default",
          "+ (it uses 512)", ground="llm"),
    Claim("mining by percentage 0.95 instead of no rule", "mined, percentage 0.95", "mined, none",
          "+0.39 (other sampling)"),
    Claim("mining by percentage 0.95 instead of margin 0.05", "mined, percentage 0.95", "mined, margin 0.05", METHOD),
    Claim("mining by percentage 0.95 instead of absolute 0.7", "mined, percentage 0.95", "mined, absolute 0.7", METHOD),
    Claim("mining by percentage 0.95 instead of random negatives", "mined, percentage 0.95", "mined, random", METHOD),
]
CLAIMS += [replace(claim, text=f"{claim.text}, {MEDQUAD}", expected=METHOD, task=MEDQUAD)
           for claim in CLAIMS if claim.arm.startswith("mined")]


def trained_alike(arm: str) -> list[str]:
    """The arms that differ from this one in their evaluation only, itself included."""
    return [name for name in ARMS if replace(ARMS[name], num_examples=0) == replace(ARMS[arm], num_examples=0)]


def arms_on(ground: str) -> list[str]:
    """The arms of the claims that are tested on this ground; without the teacher."""
    used = {arm for claim in CLAIMS if claim.ground in ("", ground) for arm in (claim.arm, claim.baseline)}
    return [arm for arm in ARMS if arm in used]
