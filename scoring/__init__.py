"""A model's scores on mteb's tasks, as run_eval.py makes them.

    tasks.py       mteb's tasks, from the hub or from local folders
    few_shot.py    solved examples of a task, from its training split
    score.py       the encoder that mteb asks, one task -> one score, means and the table
    plan.py        what a benchmark will cost, before it starts
    sharding.py    one encoder on several processes

Tasks, metrics and result files are mteb's own.
"""
