"""Files and folders that survive interruptions, and the words of reports and errors.

Files, then runs, then words:

    whole_files.py  files and folders that appear whole or not at all
    json_files.py   untrusted JSON, read within bounds
    stages.py       a program of several stages in one folder, which the same call resumes
    run_lock.py     a lock on a folder for one run at a time
    names.py        names and command lines for reports, without folders of this machine
    error_text.py   another library's error in one line
    console.py      messages on the standard error, printed as they are
    quiet.py        what other libraries say and a user can do nothing about, left out
    installation.py the command that installs an extra
    old_names.py    old names of methods and arguments, with a FutureWarning
"""
