"""A model's MTEB(eng, v2) scores beside the public ones: the leaderboard's ranking, and a report of one run.

    compare.py              public scores, means, Borda ranks; arrays and names, nothing else
    results.py              a run as it is handed in, and what of it can be compared
    content.py              what a report says, as blocks of text and tables
    pictures.py             bars and differences as SVG
    page.py, markdown.py    the blocks as one HTML page, and as Markdown
    report.py               write_report: both files of a run
    make_public_scores.py   makes public_scores.csv
"""
