"""Scores of a model on mteb's tasks; tasks, metrics and result files are mteb's.

    tasks.py                  mteb's tasks, with data from the hub or from local folders
    local_data.py             data of a local folder, checked, as mteb reads them
    few_shot.py               in-context examples from a task's training split or a file
    encoder.py                the encoder that mteb scores: which texts get the instruction
    results.py                task -> score, means, table
    plan.py                   texts, tokens and hours of an evaluation before it starts
    distributed_embedder.py   one embedder on several processes
    cached_embedder.py        an embedder with its vectors kept on disk
    model_identity.py         newest run, name and revision of a model
    run.py                    steps of run_eval.py: all tasks, report
    retrieval.py              nDCG@10 of a small retrieval set without mteb, for run_train.py
    report/                   comparison with public scores: report.html, report.md
"""
