"""From soft_labels.jsonl to a trained model.

    data.py          soft_labels.jsonl -> batches of one task
    data_report.py   what is worth knowing about the data before the first step
    trainer.py       one step, and the loop around it
    grad_cache.py    batches larger than memory: gradient caching
    memory.py        --mini-batch-tokens auto
    model_source.py  what --model names, and the model built from it
    run_dir.py       the run folder: run.json, saved states, resume
    metrics.py       metrics.jsonl, progress, the loss curve
    export.py        the trained model or adapter as other libraries load it
    arguments.py     the command line
"""
