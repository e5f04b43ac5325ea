"""The report of an evaluation: MTEB(eng, v2) scores compared with the public leaderboard, as HTML and Markdown.

    write.py         write_report: both files of a run
    run_results.py   the results of a run, and which of them can be compared
    leaderboard.py   public scores, means and Borda ranks; numpy only
    content.py       what the report says, as blocks of text, tables and charts
    charts.py        bar charts as SVG
    page.py          the blocks as one HTML page
    markdown.py      the blocks as Markdown
    escaping.py      texts from outside, escaped for HTML and Markdown

data/make_public_scores.py writes public_scores.csv.
"""
