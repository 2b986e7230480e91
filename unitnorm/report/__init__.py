"""What the tables and figures of every experiment share.

    style       settings, colours, layout and bytes of figures; names and order of the updates
    tables      a table as Markdown, LaTeX, CSV and for the terminal
    statistics  means, intervals, paired tests, outliers, mean curves

What an experiment shows of its records stands beside it, in its own `report` or `tables`.
"""
