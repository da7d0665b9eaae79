"""Text and data sets, from files and the Hub to rows of tokens.

Reading:

    sources.py      a data set by name: a local file, a folder or the Hub, as numbered rows
    documents.py    texts to be measured: files, folders and data sets of the Hub, as documents by domain
    text_files.py   local files as records with their lines; the user's own text by domain
    formats.py      layouts of columns, and the five kinds of row that they mean
    bad_rows.py     errors of data, and the rows that cannot be used
    corpus.py       text that every Python installation carries, by domain

To tokens and rows:

    chat_text.py    conversations as their chat template writes them, and the assistant's turns in that text
    encoding.py     rows to token ids and labels
    tokenizer.py    a byte-level tokenizer trained on the recipe's own text
    packing.py      rows of equal length, and mixtures of domains
"""
