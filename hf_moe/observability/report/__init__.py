"""One self-contained HTML page about the routing of a model.

    from_trace.py  the page's data from a routing trace
    data.py        plain data, packed for the page's script; they need no trace
    page.py        data in, HTML out
    glossary.py    what every metric means and what is good
    text.py        text of unknown origin made safe, numbers made short

template.html.j2 is the page's frame, style.css its style. The scripts read the packed data (data.js), draw charts
(charts.js), the sections (sections.js) and the tokens (tokens.js); main.js runs them.
"""
