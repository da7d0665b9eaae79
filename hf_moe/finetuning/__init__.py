"""Shared parts of the fine-tuning recipes: prepare a job, measure it, train it, report.

    arguments.py       a recipe's choices
    command_line/      the choices read, from YAML and the command line, and their help
    prepare.py         a job: output folder, seed, data, model; whatever cannot be used is refused
    domains.py         the data of a job, by domain: training rows and held-out rows
    packing_check.py   proof that the model keeps packed examples apart
    other_towers.py    vision and audio towers, which training on text leaves as they are
    measure.py         held-out loss, chosen experts and samples of every domain
    samples.py         what the model writes after a few held-out prompts
    run/               learning rate, memory and plan before training; evaluation and log lines while it runs
    train.py           the ordinary Trainer over the job, and what became of it
    save.py            an adapter or a model, with the routers' hash; no card of other libraries
    report.py          `report.json`, and the table of domains
    card.py            the results folder: report, plots, model card
    surroundings.py    versions, machine, warnings, errors in one line

TRL's trainers:

    trl.py             their arguments, job, trainer and report for a Mixture-of-Experts
    trl_data.py        their data, read and checked as for the other recipes
"""
