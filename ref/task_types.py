"""Task types: where the instruction goes, and which passages a query uses as negatives.

    type                    instruction on           negatives
    normal                  queries                  hard negatives and the other passages of the batch
    only_1neg               queries                  one hard negative and the other passages of the batch
    symmetric_sts,
    symmetric_clustering    queries and passages     hard negatives
    symmetric_class         queries                  all given hard negatives

`--in-batch-negatives` all or none overrides the last column for all types; the presets `small` and
`small-pretrained` set all.
The names are FlagEmbedding's. Source: arXiv 2409.15700 and its trainer.
"""

from typing import NamedTuple


class TaskType(NamedTuple):
    """One row of the table."""

    instruct_passages: bool  # passages carry the instruction too
    in_batch_negatives: bool
    max_negatives: int | None = None  # instead of --num-negatives


TASK_TYPES = {
    "normal": TaskType(instruct_passages=False, in_batch_negatives=True),
    "only_1neg": TaskType(instruct_passages=False, in_batch_negatives=True, max_negatives=1),
    "symmetric_sts": TaskType(instruct_passages=True, in_batch_negatives=False),
    "symmetric_clustering": TaskType(instruct_passages=True, in_batch_negatives=False),
    "symmetric_class": TaskType(instruct_passages=False, in_batch_negatives=False, max_negatives=10**9),
}


def check_task_type(value: object, what: str) -> str:
    """Return `value` if it is a type of the table; raises ValueError that starts with `what`."""
    if not isinstance(value, str) or value not in TASK_TYPES:
        raise ValueError(f"{what} must be one of {', '.join(TASK_TYPES)} (got {value!r:.80})")
    return value
