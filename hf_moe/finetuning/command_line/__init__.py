"""A recipe's choices, read from a YAML file and the command line, and the help that explains them.

Reading:

    parse.py         one instance of each of a recipe's dataclasses
    yaml_config.py   a YAML file, read strictly
    values.py        values of the right type, or the rule in words
    names.py         what was meant by an option that does not exist

Explaining, without the imports of a recipe, which take seconds and TRL:

    methods.py       the methods of `hf-moe finetune`, and the options that their help shows
    help.py          the short help, and the long one with every option
    source.py        options, read from the recipes' source text
"""
